"""Sequences that several laws drew, weighed as one sample of the mixture of these laws; functions of tensors alone.

Of N sequences a share α_k came from law q_k. Whichever drew each, together they are a sample of m = Σ_k α_k q_k (Owen &
Zhou 2000), and a sequence's weight P/m stays below P/(α_k q_k) for every k at once. A sequence that joins never makes
the estimates worse, as N m(x) = Σ_i q_k(i)(x) only grows; so all that are kept are used.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from tiltlm import estimation

# The place of the base among the laws.
BASE = 0


def mixture_logprob(under: Tensor, origin: Tensor) -> Tensor:
    """log m [N] from the log-probabilities [N, K] under K laws and the law that drew each sequence, ``origin`` [N]."""
    shares = torch.bincount(origin, minlength=under.shape[1]).to(under) / len(origin)
    return (under + shares.log()).logsumexp(-1)


@dataclass(frozen=True)
class PoolMetrics:
    """What ``metrics.jsonl`` says of a pool: its ``sequences``, the number of laws that drew them, the base's share.

    ``ess`` is the effective size of the weights w = P/m, in sequences, ``hits`` the number with P > 0, and ``pareto_k``
    the k̂ of w: above 0.7 their mean cannot be trusted. With fewer than 21 hits, or hits that weigh alike, there is no
    tail to look at and k̂ is not finite; then the number of hits is what counts.
    """

    sequences: int
    proposals: int
    base_share: float
    ess: float
    hits: int
    pareto_k: float

    @staticmethod
    def of(log_weights: Tensor, origin: Tensor) -> PoolMetrics:
        """From log P − log m [N] and the law of each sequence [N]."""
        return PoolMetrics(
            sequences=len(origin),
            proposals=int((torch.bincount(origin) > 0).sum()),
            base_share=float((origin == BASE).double().mean()),
            ess=estimation.effective_sample_size(log_weights).value,
            hits=int((log_weights > -math.inf).sum()),
            pareto_k=estimation.pareto_k(log_weights),
        )

    def to_json(self) -> dict[str, float | None]:
        """By name; what is not finite becomes None."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}
