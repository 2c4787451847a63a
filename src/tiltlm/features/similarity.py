"""The similarity of a text to given texts, by a sentence embedding model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tiltlm.errors import UsageError
from tiltlm.features.batch import Batch
from tiltlm.features.feature import Feature
from tiltlm.features.kinds import feature_kind
from tiltlm.features.models import TextModel


@dataclass(frozen=True, kw_only=True)
class Similarity(Feature):
    """The largest cosine similarity between a text's embedding and those of ``to``."""

    model: TextModel
    to: tuple[str, ...]

    def compute(self, batch: Batch) -> Tensor:
        loaded, size = self.model.loaded, self.model.batch_size
        wanted = loaded.measure(loaded.encode(list(self.to), max_length=self.model.max_length), size, mean_embedding)
        found = self.model.measure(batch, mean_embedding).reshape(len(batch), wanted.shape[1])
        return (found @ wanted.T).amax(1)


@feature_kind("similarity")
def similarity(
    to: str | Sequence[str],
    model: str,
    reads: str = "completion",
    batch_size: int = 32,
    max_length: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Similarity:
    """The cosine similarity in [-1, 1] to a text, or to the most similar of several, by a sentence embedding model.

    The embedding is the mean of the last hidden states of ``AutoModel`` over the tokens without padding (Reimers and
    Gurevych, EMNLP 2019). It ``reads`` the ``completion`` or the whole ``text``. The other settings are those of
    ``classifier``. Raises ModelError if the model cannot be loaded, UsageError for invalid settings.
    """
    texts = [to] if isinstance(to, str) else to
    fine = isinstance(texts, Sequence) and all(isinstance(text, str) and text.strip() for text in texts)
    if not fine or not texts:
        raise UsageError(f"similarity.to: expected a text or a list of texts, got {to!r}")
    found = TextModel(
        "similarity", "AutoModel", model, reads, batch_size, max_length, device, dtype, revision, trust_remote_code
    )
    shown = texts[0] if len(texts[0]) <= 30 else texts[0][:29] + "…"
    name = f"similarity to '{shown}'" + (", …" if len(texts) > 1 else "")
    return Similarity(name=name, binary=False, model=found, to=tuple(texts))


def mean_embedding(outputs: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The mean of the hidden states [B, T, H] over the tokens without padding, scaled to length 1: [B, H]."""
    mask = inputs["attention_mask"].unsqueeze(-1).float()
    mean = (outputs.last_hidden_state.float() * mask).sum(1) / mask.sum(1).clamp_min(1)
    unit: Tensor = mean / mean.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return unit
