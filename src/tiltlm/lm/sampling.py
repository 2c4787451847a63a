"""Ancestral sampling with a key-value cache, which records the log-probability of every token that it draws."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiltlm.errors import NumericalError
from tiltlm.lm.guide import Guide
from tiltlm.lm.samples import Law, Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A batch is compacted once this share of its rows has ended: copying the cache costs about one decoding step.
COMPACT_BELOW = 0.8


def draw(log_probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One token [N] per row of log-probabilities [N, V], by inverting the cumulative distribution.

    Much cheaper than ``torch.multinomial`` on a CPU; a token of probability zero is never drawn.
    """
    cdf = log_probabilities.exp().cumsum(-1)
    total = cdf[:, -1:]
    uniform = torch.rand(total.shape, dtype=cdf.dtype, device=cdf.device, generator=generator) * total
    below = torch.minimum(uniform, torch.nextafter(total, torch.zeros_like(total)))
    # NaN probabilities would give an index out of range, which a GPU answers by ending the process.
    return torch.searchsorted(cdf, below, right=True).squeeze(-1).clamp_max(cdf.shape[-1] - 1)


def accepts(model: PreTrainedModel, argument: str) -> bool:
    """Whether the model's forward takes this argument by name."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT hides it behind **kwargs
    return argument in inspect.signature(inner.forward).parameters


def positions(mask: Tensor) -> Tensor:
    """Position of each token [N, L] when padding on the left does not count."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


class Decoder:
    """A model's state while it decodes a batch of rows: its cache, its attention mask and its next input."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor, mask: Tensor) -> None:
        self.model = model
        self.tokens = tokens
        self.mask = mask
        # Without padding no mask is needed, and attention takes its fast path.
        self.ragged = not bool(mask.all())
        self.pass_positions = self.ragged and accepts(model, "position_ids")
        self.cache: Any = None
        self.fresh = tokens

    def logits(self) -> Tensor:
        """Logits [N, V] of the next token; a model without a cache reads its whole prefix again."""
        arguments: dict[str, Any] = {"input_ids": self.fresh, "use_cache": True}
        if self.cache is not None:
            arguments["past_key_values"] = self.cache
        if self.ragged:
            arguments["attention_mask"] = self.mask.long()
            if self.pass_positions:
                arguments["position_ids"] = positions(self.mask)[:, -self.fresh.shape[1] :]
        if accepts(self.model, "logits_to_keep"):
            arguments["logits_to_keep"] = 1
        output = self.model(**arguments)
        self.cache = getattr(output, "past_key_values", None)
        return output.logits[:, -1]  # type: ignore[no-any-return]

    def append(self, tokens: Tensor) -> None:
        """Take the drawn tokens [N] as the next input."""
        self.tokens = torch.cat([self.tokens, tokens[:, None]], dim=1)
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        self.fresh = self.tokens if self.cache is None else tokens[:, None]

    def keep(self, rows: Tensor) -> bool:
        """Take these rows [n], in this order, for all; False where the model's cache cannot do so."""
        if self.cache is not None:
            # Not batch_select_indices: it forgets the states of linear-attention layers.
            if not hasattr(self.cache, "reorder_cache"):
                return False
            self.cache.reorder_cache(rows)
        self.tokens, self.mask, self.fresh = self.tokens[rows], self.mask[rows], self.fresh[rows]
        return True


def prefill(model: PreTrainedModel, prompts: Prompts, prompt_index: Tensor) -> tuple[Decoder, Tensor]:
    """A decoder that has read the prompt of each row [N], and the logits [N, V] of the first token.

    Rows of one prompt share its reading, where the model's cache can be spread over them.
    """
    shared, row = torch.unique(prompt_index, return_inverse=True)
    # One token is read as quickly for all rows.
    if prompts.tokens.shape[1] > 1 and len(shared) < len(prompt_index):
        decoder = Decoder(model, prompts.tokens[shared], prompts.mask[shared])
        logits = decoder.logits()
        if decoder.keep(row):
            return decoder, logits[row]
    decoder = Decoder(model, prompts.tokens[prompt_index], prompts.mask[prompt_index])
    return decoder, decoder.logits()


@torch.no_grad()
def sample_batch(
    model: PreTrainedModel,
    prompts: Prompts,
    prompt_index: Tensor,
    *,
    max_new_tokens: int,
    eos_ids: Tensor,
    pad_id: int,
    law: Law,
    generator: torch.Generator,
    guide: Guide | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one completion for each entry of ``prompt_index`` [N].

    Returns tokens [N, T], mask [N, T] and token log-probabilities [N, T] (nats) under ``law``; a row ends with the
    first EOS, which belongs to it, or after ``max_new_tokens``. Rows that have ended leave the batch. Raises
    NumericalError when the model's probabilities are not numbers.
    """
    n, device = len(prompt_index), prompt_index.device
    tokens = torch.full((n, max_new_tokens), pad_id, dtype=torch.long, device=device)
    mask = torch.zeros((n, max_new_tokens), dtype=torch.bool, device=device)
    logprob: Tensor | None = None
    alive = torch.arange(n, device=device)
    open_rows = torch.ones(n, dtype=torch.bool, device=device)
    states = guide.begin(n) if guide is not None else None
    decoder, logits = prefill(model, prompts, prompt_index)
    for t in range(max_new_tokens):
        if guide is not None and states is not None:
            logits = logits + guide.log_weights(states, t)
        log_probabilities = law.log_probabilities(logits)
        drawn = draw(log_probabilities, generator)
        if guide is not None and states is not None:
            states = guide.advance(states, drawn)
        if logprob is None:
            logprob = torch.zeros((n, max_new_tokens), dtype=log_probabilities.dtype, device=device)
        rows = alive[open_rows]
        tokens[rows, t] = drawn[open_rows]
        mask[rows, t] = True
        logprob[rows, t] = log_probabilities.gather(-1, drawn[:, None]).squeeze(-1)[open_rows]
        open_rows &= ~torch.isin(drawn, eos_ids)
        still_open = int(open_rows.sum())
        if still_open == 0:
            break
        decoder.append(drawn)
        if still_open < COMPACT_BELOW * len(alive):
            kept = open_rows.nonzero().squeeze(-1)
            if decoder.keep(kept):
                alive, open_rows = alive[kept], open_rows[kept]
                states = states[kept] if states is not None else None
        if t + 1 < max_new_tokens:
            logits = decoder.logits()
    assert logprob is not None
    if not bool(logprob.isfinite().all()):
        raise NumericalError(
            "the model gave a next token a probability that is not a number: its weights have diverged (lower "
            "training.learning_rate) or its dtype is too narrow (try bfloat16 or float32)"
        )
    return tokens[:, : t + 1], mask[:, : t + 1], logprob[:, : t + 1]
