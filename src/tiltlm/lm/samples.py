"""Samples: token sequences drawn from a language model, with their log-probabilities when they were drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiltlm.errors import UsageError
from tiltlm.lm.guide import Guide
from tiltlm.lm.prompts import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Differences up to which logits (nats) and cumulative probabilities (a share of top_p) count as equal.
TIE_NATS = 1e-3
TIE_SHARE = 1e-6
TENSORS = ("tokens", "mask", "proposal_logprob", "prompt_index")


@dataclass(frozen=True)
class SamplingSettings:
    """How logits become the distribution to sample from: temperature, then top-k, then top-p.

    ``temperature`` divides the logits. ``top_k`` keeps the k likeliest tokens (0: all). ``top_p`` keeps the smallest
    set of likeliest tokens whose probability reaches p (1: all). The default is the model's own distribution. Raises
    UsageError for settings out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        checks = {
            f"temperature: {self.temperature!r} must be a number above 0 (sampling, not greedy decoding)": (
                isinstance(self.temperature, Real) and 0 < self.temperature < math.inf
            ),
            f"top_k: {self.top_k!r} must be a whole number, at least 0 (all tokens)": (
                isinstance(self.top_k, Integral) and self.top_k >= 0
            ),
            f"top_p: {self.top_p!r} must be a number in (0, 1]": isinstance(self.top_p, Real) and 0 < self.top_p <= 1,
        }
        for message, fine in checks.items():
            if not fine:
                raise UsageError(message)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities [..., V] of the next token from logits [..., V], in float32 or better."""
        if self != SamplingSettings():
            return self.log_probabilities(logits).exp()
        return _precise(logits).softmax(-1)

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """Log-probabilities [..., V] of the next token from logits [..., V], in float32 or better."""
        logits = _precise(logits)
        if self.temperature != 1.0:
            logits = logits / self.temperature
        if 0 < self.top_k < logits.shape[-1] or self.top_p < 1.0:
            logits = logits.masked_fill(self._dropped(logits.detach()), float("-inf"))
        return logits.log_softmax(-1)

    def _dropped(self, logits: Tensor) -> Tensor:
        """A mask [..., V] of tokens that top-k and top-p remove; of equally likely tokens the lower id is kept."""
        # Passes with and without a cache differ by rounding, which must not decide between equally likely tokens.
        order = (logits / TIE_NATS).round().sort(dim=-1, descending=True, stable=True).indices
        ranked = logits.gather(-1, order)
        if self.top_k:
            ranked[..., self.top_k :] = float("-inf")
        if self.top_p < 1.0:
            mass = ranked.softmax(-1)
            ranked = ranked.masked_fill(mass.cumsum(-1) - mass >= self.top_p * (1 - TIE_SHARE), float("-inf"))
        return torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, order, ranked.isneginf())


def _precise(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


@dataclass(frozen=True)
class Samples:
    """N completions of up to T tokens.

    ``tokens`` [N, T] are right-padded. ``mask`` [N, T] marks the sampled tokens, EOS included. ``proposal_logprob``
    [N, T] is the log-probability (nats) of each sampled token under the distribution it was drawn from, 0 where
    masked. ``prompt_index`` [N] points into ``prompts``. ``settings`` and ``guide`` (None: unguided) define the
    distribution. ``exact``: a scoring pass of the model gives ``proposal_logprob`` too, up to rounding.
    """

    tokens: Tensor
    mask: Tensor
    proposal_logprob: Tensor
    prompt_index: Tensor
    prompts: Prompts
    settings: SamplingSettings
    tokenizer: PreTrainedTokenizerBase | None = field(repr=False, compare=False)
    guide: Guide | None = field(default=None, repr=False, compare=False)
    exact: bool = True

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @cached_property
    def lengths(self) -> Tensor:
        """Number of sampled tokens per row [N]."""
        return self.mask.sum(-1)

    @cached_property
    def _columns_and_rows(self) -> Tensor:
        return self.mask.T.nonzero()

    @property
    def flat_columns(self) -> Tensor:
        """The column t of each sampled token [P], in order of columns, then rows."""
        return self._columns_and_rows[:, 0]

    @property
    def flat_rows(self) -> Tensor:
        """The row of each sampled token [P], in the same order."""
        return self._columns_and_rows[:, 1]

    @cached_property
    def flat_tokens(self) -> Tensor:
        """The sampled tokens [P] without padding, in the same order."""
        return self.tokens[self.flat_rows, self.flat_columns]

    @cached_property
    def sequence_logprob(self) -> Tensor:
        """Log-probability [N] of each completion under the distribution it was drawn from, in nats, float64."""
        return self.proposal_logprob.double().sum(-1)

    @cached_property
    def completion_ids(self) -> list[list[int]]:
        """The sampled token ids of each row, without padding."""
        return [row[:n] for row, n in zip(self.tokens.tolist(), self.lengths.tolist(), strict=True)]

    @cached_property
    def texts(self) -> list[str]:
        """The completions as text, special tokens removed."""
        if self.tokenizer is None:
            raise ValueError("these samples have no tokenizer, so they cannot be decoded to text")
        return list(self.tokenizer.batch_decode(self.completion_ids, skip_special_tokens=True))

    @cached_property
    def prompt_texts(self) -> list[str | None]:
        """The prompt of each row; None without a prompt."""
        return [self.prompts.texts[i] for i in self.prompt_index.tolist()]

    @cached_property
    def prompt_ids(self) -> Tensor:
        """The position [N] of each row's prompt in the full list of prompts, on the CPU."""
        return torch.tensor(self.prompts.ids)[self.prompt_index.cpu()]

    @cached_property
    def columns(self) -> dict[str, list[Any]]:
        """The prompts' columns, with the value of each row's prompt: N values a column."""
        index = self.prompt_index.tolist()
        return {name: [values[i] for i in index] for name, values in self.prompts.columns.items()}

    def select(self, index: Tensor) -> Samples:
        """The rows given by ``index``: integers or a boolean mask."""
        return replace(self, **{name: getattr(self, name)[index] for name in TENSORS})

    def trimmed(self) -> Samples:
        """The samples without columns that are padding in every row."""
        width = max(1, int(self.lengths.max())) if len(self) else 1
        return replace(
            self, **{name: getattr(self, name)[:, :width] for name in ("tokens", "mask", "proposal_logprob")}
        )

    @staticmethod
    def concatenate(parts: Sequence[Samples]) -> Samples:
        """The rows of all parts, which must share prompts, settings, guide and tokenizer."""
        width = max(part.tokens.shape[1] for part in parts)

        def join(name: str) -> Tensor:
            tensors = [getattr(part, name) for part in parts]
            if name != "prompt_index":
                tensors = [torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in tensors]
            return torch.cat(tensors)

        joined: dict[str, Any] = {name: join(name) for name in TENSORS}
        return replace(parts[0], **joined, exact=all(part.exact for part in parts))
