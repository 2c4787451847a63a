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
    """The probability of a label under a model, or 1 where it is at least ``at``."""

    model: TextModel
    label: str
    at: float | None

    def compute(self, batch: Batch) -> Tensor:
        config = self.model.config
        logits = self.model.measure(batch, _logits).reshape(len(batch), config.num_labels)
        multi_label = config.problem_type == "multi_label_classification"
        probabilities = logits.sigmoid() if multi_label else logits.softmax(-1)
        probability = probabilities[:, _labels(self.model).index(self.label)]
        return probability if self.at is None else (probability >= self.at).double()


@dataclass(frozen=True, kw_only=True)
class RewardModel(Feature):
    """The output of a model with one output."""

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
    """The probability of ``label`` under a text-classification model; with ``threshold``, 1 where it is at least that.

    ``model`` is a folder or a name on the hub that ``AutoModelForSequenceClassification`` loads, from safetensors
    only. It ``reads`` the ``completion``, the ``text`` (prompt and completion), both as a ``pair`` of texts, or both as
    a ``chat``. Texts are cut at ``max_length`` tokens (None: the model's limit). Probabilities are a softmax over the
    labels, or a sigmoid if the model's problem type is multi-label. Raises ModelError if the model cannot be loaded,
    UsageError for an unknown label and for invalid settings.
    """
    found = TextModel(
        "classifier", CLASSIFICATION, model, reads, batch_size, max_length, device, dtype, revision, trust_remote_code
    )
    labels = _labels(found)
    if len(labels) < 2:
        raise UsageError(f"classifier.model: '{model}' has one output, so it cannot classify; use reward_model")
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
    """The output of a sequence-classification model with one output, on prompt and completion.

    It ``reads`` both as one ``text``, as a ``pair`` of texts (encoders) or as a ``chat`` in its own template, or the
    ``completion`` alone. The other settings are those of ``classifier``. Raises ModelError if the model cannot be
    loaded, UsageError if it has several outputs and for invalid settings.
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
