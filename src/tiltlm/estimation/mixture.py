"""Sequences of several distributions, token by token as drawn from their mixture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mixture(logprobs: Sequence[Tensor], shares: Sequence[float | Tensor]) -> Tensor:
    """Log-probabilities of tokens [N, T] under Σ_k α_k q_k, from those under each q_k [N, T] and its share α_k.

    A share is one number, or one for each row [N] if prompts differ in it. The mixture is one of whole sequences: a
    prefix has Σ_k α_k q_k(x_≤t), and a token the quotient of two prefixes.
    """
    parts = []
    for under, share in zip(logprobs, shares, strict=True):
        log_share = torch.as_tensor(share, dtype=torch.float64, device=under.device).log()
        parts.append(under.double().cumsum(-1) + log_share.reshape(-1, 1))
    total = torch.stack(parts).logsumexp(0)
    return torch.diff(total, prepend=torch.zeros_like(total[:, :1]), dim=-1)
