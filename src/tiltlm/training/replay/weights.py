"""Sequences of several proposals, weighted as one sample of their mixture; functions of tensors alone.

Of N sequences a share α_k came from proposal q_k. Together they are a sample of m = Σ_k α_k q_k, whichever drew each
(Owen & Zhou 2000), and a sequence's weight P/m stays below P/(α_k q_k) for every k at once. A further sequence never
makes the estimates worse, as N m(x) = Σ_i q_k(i)(x) only grows, so all that are kept are used.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from tiltlm import estimation

# The index of the base among the proposals.
BASE_INDEX = 0


def mixture_logprob(logprobs: Tensor, origin: Tensor) -> Tensor:
    """log m [N], from log-probabilities [N, K] under K proposals; ``origin`` [N] is each row's proposal."""
    shares = torch.bincount(origin, minlength=logprobs.shape[1]).to(logprobs) / len(origin)
    return (logprobs + shares.log()).logsumexp(-1)


@dataclass(frozen=True)
class PoolMetrics:
    """The ``pool`` entry of ``metrics.jsonl``: ``sequences``, the number of proposals that drew them, the base's share.

    ``ess`` is the effective sample size of the weights w = P/m, in sequences. ``hits`` is the number with P > 0.
    ``pareto_k`` is the k̂ of w: above 0.7 their mean is unreliable. With fewer than 21 hits, or hits of equal weight,
    there is no tail to fit and k̂ is not finite; then the number of hits decides.
    """

    sequences: int
    proposals: int
    base_share: float
    ess: float
    hits: int
    pareto_k: float

    @staticmethod
    def of(log_weights: Tensor, origin: Tensor) -> PoolMetrics:
        """From log P − log m [N] and the index of each row's proposal [N]."""
        return PoolMetrics(
            sequences=len(origin),
            proposals=int((torch.bincount(origin) > 0).sum()),
            base_share=float((origin == BASE_INDEX).double().mean()),
            ess=estimation.effective_sample_size(log_weights).value,
            hits=int((log_weights > -math.inf).sum()),
            pareto_k=estimation.pareto_k(log_weights),
        )

    def to_json(self) -> dict[str, float | None]:
        """By name; None where a number is not finite."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}
