"""Sequences of several distributions, token by token as drawn from their mixture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mixture(logprobs: Sequence[Tensor], weights: Sequence[float | Tensor]) -> Tensor:
    """Log-probabilities of tokens [N, T] under Σ_k α_k q_k, from those under each q_k [N, T] and its weight α_k.

    A weight is one number, or one for each row [N] if it depends on the prompt. The mixture is one of whole sequences:
    a prefix has probability Σ_k α_k q_k(x_≤t), and a token the quotient of two prefixes.
    """
    parts = []
    for logprob, weight in zip(logprobs, weights, strict=True):
        log_weight = torch.as_tensor(weight, dtype=torch.float64, device=logprob.device).log()
        parts.append(logprob.double().cumsum(-1) + log_weight.reshape(-1, 1))
    total = torch.stack(parts).logsumexp(0)
    return torch.diff(total, prepend=torch.zeros_like(total[:, :1]), dim=-1)
