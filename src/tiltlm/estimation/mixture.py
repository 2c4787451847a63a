"""Sequences of several laws, token by token as drawn from the mixture of these laws."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mixture(laws: Sequence[Tensor], shares: Sequence[float | Tensor]) -> Tensor:
    """Log-probabilities of tokens [N, T] under Σ_k α_k q_k, from those under each q_k [N, T] and its share α_k.

    A share is one number, or one for each row [N], as where prompts differ in it. The mixture is of whole sequences: of
    a prefix it is Σ_k α_k q_k(x_≤t), and a token's is the quotient of two.
    """
    parts = []
    for law, share in zip(laws, shares, strict=True):
        log_share = torch.as_tensor(share, dtype=torch.float64, device=law.device).log()
        parts.append(law.double().cumsum(-1) + log_share.reshape(-1, 1))
    total = torch.stack(parts).logsumexp(0)
    return torch.diff(total, prepend=torch.zeros_like(total[:, :1]), dim=-1)
