"""What a trained sequence-classification model says of a text: the probability of a label, or a reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tiltlm.errors import UsageError, nearest
from tiltlm.features.batch import Batch
from tiltlm.features.feature import Feature
from tiltlm.features.kinds import feature_kind
from tiltlm.features.models import CLASSIFICATION, TextModel


@dataclass(frozen=True, kw_only=True)
class Classifier(Feature):
    """The probability that a model gives to a label, or whether that reaches ``at``."""

    model: TextModel
    label: str
    at: float | None

    def compute(self, batch: Batch) -> Tensor:
        config = self.model.config
        logits = self.model.measure(batch, _logits).reshape(len(batch), config.num_labels)
        several = config.problem_type == "multi_label_classification"
        chances = logits.sigmoid() if several else logits.softmax(-1)
        chance = chances[:, _labels(self.model).index(self.label)]
        return chance if self.at is None else (chance >= self.at).double()


@dataclass(frozen=True, kw_only=True)
class RewardModel(Feature):
    """The one number that a model gives to a text."""

    model: TextModel

    def compute(self, batch: Batch) -> Tensor:
        return self.model.measure(batch, _logits).reshape(len(batch))


@feature_kind("classifier")
def classifier(
    model: str,
    label: str | None = None,
    threshold: float | None = None,
    reads: str = "completion",
    batch_size: int = 32,
    max_length: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Classifier:
    """The probability of ``label`` in [0, 1] by a text-classification model; with ``threshold``, 1 where it is reached.

    ``model`` is a folder or a name on the hub that ``AutoModelForSequenceClassification`` loads, from safetensors
    only. It ``reads`` the ``completion``, the whole ``text`` (prompt and completion), both as a ``pair`` of texts, or
    as a ``chat``. Longer texts are cut at ``max_length`` tokens (None: as many as the model can read). Probabilities
    are a softmax over the labels, or a sigmoid each where the model's problem type is multi-label. Raises ModelError
    where there is no such model, UsageError for a label that it does not have and for settings that cannot be right.
    """
    found = TextModel(
        "classifier", CLASSIFICATION, model, reads, batch_size, max_length, device, dtype, revision, trust_remote_code
    )
    labels = _labels(found)
    if len(labels) < 2:
        raise UsageError(f"classifier.model: '{model}' has one output and no labels to tell apart; use reward_model")
    if label is None:
        raise UsageError(f"classifier.label: is missing; valid: {', '.join(labels)}")
    if label not in labels:
        raise UsageError(f"classifier.label: '{model}' has no label {label!r}; {nearest(str(label), labels)}")
    if threshold is not None:
        number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
        if not number or not 0 < threshold <= 1:
            raise UsageError(f"classifier.threshold: expected a probability above 0, at most 1, got {threshold!r}")
    name = label if threshold is not None else f"probability of {label}"
    return Classifier(name=name, binary=threshold is not None, model=found, label=label, at=threshold)


@feature_kind("reward_model")
def reward_model(
    model: str,
    reads: str = "text",
    batch_size: int = 32,
    max_length: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> RewardModel:
    """The raw score of prompt and completion by a sequence-classification model with one output.

    It ``reads`` both as one ``text``, as a ``pair`` of texts (encoders), or as a ``chat`` in its own template; or the
    ``completion`` alone. The other settings are those of ``classifier``. Raises ModelError where there is no such
    model, UsageError where it has several outputs and for settings that cannot be right.
    """
    found = TextModel(
        "reward_model", CLASSIFICATION, model, reads, batch_size, max_length, device, dtype, revision, trust_remote_code
    )
    labels = _labels(found)
    if len(labels) != 1:
        raise UsageError(
            f"reward_model.model: '{model}' has {len(labels)} outputs, not one; use classifier with a label"
        )
    return RewardModel(name=f"reward by {found.short_name}", binary=False, model=found)


def _labels(model: TextModel) -> list[str]:
    names = model.config.id2label
    return [str(names[index]) for index in sorted(names)]


def _logits(outputs: Any, inputs: dict[str, Tensor]) -> Tensor:
    logits: Tensor = outputs.logits
    return logits
