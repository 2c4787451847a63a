"""Ancestral sampling with a key-value cache; records the log-probability of every sampled token."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tiltlm.errors import NumericalError, UsageError
from tiltlm.lm.cache import reserve
from tiltlm.lm.guide import Guide
from tiltlm.lm.prefill import prefill
from tiltlm.lm.prompts import Prompts
from tiltlm.lm.samples import SamplingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A batch is compacted when less than this share of its rows is open; copying the cache costs about one decoding step.
COMPACT_BELOW = 0.8
# Steps between checks for ended rows. On a GPU a check waits for all queued work, so checks are rare.
TOKENS_BETWEEN_CHECKS = {"cpu": 1}
TOKENS_BETWEEN_CHECKS_ELSEWHERE = 8
# On a CPU rows are drawn in groups that fit its cache.
CPU_DRAW_BYTES = 2**20
# Probabilities are summed in blocks first, so that only one block per row needs a cumulative sum over tokens.
BLOCK = 64


def generator_of(device: torch.device, seed: int | None, generator: torch.Generator | None) -> torch.Generator:
    """The given generator, or a new one with this seed (None: a random one). Raises UsageError if both are given."""
    if generator is None:
        generator = torch.Generator(device)
        generator.seed() if seed is None else generator.manual_seed(seed)
    elif seed is not None:
        raise UsageError(f"seed: {seed} and a generator were both given; give one of them")
    return generator


def draw(
    logits: Tensor,
    settings: SamplingSettings,
    generator: torch.Generator,
    logit_bias: Callable[[slice], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token [N] per row of logits [N, V] under ``settings``; also its log-probability [N], float32 or better.

    ``logit_bias`` gives what is added to the logits of a slice of rows. The draw inverts the cumulative distribution,
    which is much faster than ``torch.multinomial`` on a CPU. A token of probability zero is never drawn.
    """
    n, width = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    uniform = torch.rand((n, 1), dtype=dtype, device=logits.device, generator=generator)
    rows = max(1, CPU_DRAW_BYTES // (4 * width)) if logits.device.type == "cpu" else n
    tokens, masses = [], []
    for start in range(0, n, rows):
        piece = slice(start, start + rows)
        weighted = logits[piece] if logit_bias is None else logits[piece] + logit_bias(piece)
        probabilities = settings.probabilities(weighted)
        drawn = invert(probabilities, uniform[piece])
        tokens.append(drawn.squeeze(-1))
        masses.append(probabilities.gather(-1, drawn).squeeze(-1))
    return torch.cat(tokens), torch.cat(masses).log()


def invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The first token [N, 1] whose cumulative probability [N, V] exceeds the share ``uniform`` [N, 1] of the total."""
    n, width = probabilities.shape
    padding = -width % BLOCK
    blocks = (torch.nn.functional.pad(probabilities, (0, padding)) if padding else probabilities).view(n, -1, BLOCK)
    upto = blocks.sum(-1).cumsum(-1)
    wanted = _below(uniform * upto[:, -1:], upto[:, -1:])
    # With NaN probabilities the index would be out of range, and a GPU would end the process.
    block = torch.searchsorted(upto, wanted, right=True).clamp_max(upto.shape[1] - 1)
    before = torch.where(block > 0, upto.gather(-1, (block - 1).clamp_min(0)), 0.0)
    within = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK)).squeeze(1).cumsum(-1)
    rest = _below((wanted - before).clamp_min(0), within[:, -1:])
    token = block * BLOCK + torch.searchsorted(within, rest, right=True).clamp_max(BLOCK - 1)
    return token.clamp_max(width - 1)


def _below(value: Tensor, total: Tensor) -> Tensor:
    """``value``, or the largest number below ``total`` if rounding made them equal."""
    return torch.minimum(value, torch.nextafter(total, torch.zeros_like(total)))


def _bias_of_rows(guide: Guide, states: Tensor, t: int, rows: slice) -> Tensor:
    return guide.logit_bias(states[rows], t)


@torch.no_grad()
def sample_batch(
    model: PreTrainedModel,
    prompts: Prompts,
    prompt_index: Tensor,
    *,
    max_new_tokens: int,
    eos_ids: Tensor,
    pad_id: int,
    start_id: int,
    settings: SamplingSettings,
    generator: torch.Generator,
    guide: Guide | None = None,
    cache_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one completion for each entry of ``prompt_index`` [N].

    Returns tokens [N, T], mask [N, T] and token log-probabilities [N, T] (nats) under ``settings`` and ``guide``. A row
    ends with the first EOS, included, or after ``max_new_tokens``. Ended rows leave the batch. Raises NumericalError if
    a probability is NaN.
    """
    n, device = len(prompt_index), prompt_index.device
    tokens = torch.full((n, max_new_tokens), pad_id, dtype=torch.long, device=device)
    mask = torch.zeros((n, max_new_tokens), dtype=torch.bool, device=device)
    logprob: Tensor | None = None
    alive = torch.arange(n, device=device)
    open_rows = torch.ones(n, dtype=torch.bool, device=device)
    states = guide.begin(n) if guide is not None else None
    check_every = TOKENS_BETWEEN_CHECKS.get(device.type, TOKENS_BETWEEN_CHECKS_ELSEWHERE)
    decoder, logits = prefill(model, prompts, prompt_index, max_new_tokens, start_id, cache_dtype)
    reserve(decoder.cache, decoder.mask.shape[1] + max_new_tokens, cache_dtype)
    for t in range(max_new_tokens):
        if guide is not None and states is not None:
            drawn, found = draw(logits, settings, generator, partial(_bias_of_rows, guide, states, t))
            states = guide.advance(states, drawn)
        else:
            drawn, found = draw(logits, settings, generator)
        if logprob is None:
            logprob = torch.zeros((n, max_new_tokens), dtype=found.dtype, device=device)
        tokens[alive, t] = torch.where(open_rows, drawn, pad_id)
        mask[alive, t] = open_rows
        logprob[alive, t] = torch.where(open_rows, found, 0.0)
        open_rows = open_rows & ~torch.isin(drawn, eos_ids)
        if t + 1 == max_new_tokens:
            break
        decoder.append(drawn)
        if (t + 1) % check_every == 0:
            still_open = int(open_rows.sum())
            if still_open == 0:
                break
            if still_open < COMPACT_BELOW * len(alive):
                kept = open_rows.nonzero().squeeze(-1)
                if decoder.keep(kept):
                    alive, open_rows = alive[kept], open_rows[kept]
                    states = states[kept] if states is not None else None
        logits = decoder.logits()
    assert logprob is not None
    width = int(mask.any(0).sum())
    if not bool(logprob.isfinite().all()):
        raise NumericalError(
            "the model gave a next token a probability that is not a number: its weights have diverged (lower "
            "training.learning_rate) or its dtype is too narrow (try bfloat16 or float32)"
        )
    return tokens[:, :width], mask[:, :width], logprob[:, :width]
