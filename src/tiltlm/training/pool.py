"""The pool: past batches kept and trained on again, every sequence weighed as drawn from the mixture of their laws.

Of n sequences, a share α came from the base a and the others from the guided base g. However each was drawn, together
they are a sample of m = α a + (1 − α) g (Owen & Zhou 2000), and P/m stays below P/(α a) and P/((1 − α) g) at once.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tiltlm.errors import UsageError
from tiltlm.lm import Samples
from tiltlm.lm.samples import TENSORS
from tiltlm.objectives import Guided, Objective
from tiltlm.training.arguments import TrainingArguments
from tiltlm.training.batch import Batch
from tiltlm.training.proposal import ProposalRule

POOLED = "pool"
# Batches in each of the two stretches that are compared, and how many standard errors tell them apart.
STRETCH, ERRORS = 20, 2.0


class Pool:
    """The last ``size`` sequences of base and guided base, with their features, in memory; drawn from by ``seed``.

    A sequence of T tokens with K features takes 13 T + 8 K bytes. ``like`` are samples of the same run, with all of its
    prompts.
    """

    def __init__(self, size: int, seed: int, like: Samples) -> None:
        self.size, self.like = size, replace(like, guide=None)
        self.places = {name: place for place, name in enumerate(like.prompts.ids)}
        self.generator = torch.Generator().manual_seed(seed)
        self.samples: Samples | None = None
        self.features = torch.empty(0, 0, dtype=torch.float64)
        self.from_base = torch.empty(0, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.from_base)

    @property
    def base_share(self) -> float:
        """The share α of sequences that the base drew."""
        return float(self.from_base.double().mean())

    def add(self, batch: Batch) -> None:
        """Keep a batch; the oldest sequences make room for it."""
        new = torch.full((len(batch.samples),), batch.from_base)
        ids = batch.samples.prompts.ids
        here = torch.tensor([self.places[ids[i]] for i in batch.samples.prompt_index.tolist()])
        samples = replace(self.like, **{name: getattr(batch.samples, name) for name in TENSORS})
        samples = replace(samples, prompt_index=here.to(samples.tokens.device))
        if self.samples is not None:
            samples = Samples.concatenate([self.samples, samples])
            new = torch.cat([self.from_base, new])
        features = torch.cat([self.features.reshape(-1, batch.features.shape[1]), batch.features])
        kept = torch.arange(max(0, len(new) - self.size), len(new))
        self.samples = samples.select(kept.to(samples.tokens.device))
        self.features, self.from_base = features[kept], new[kept]

    def draw(self, n: int) -> Batch:
        """As many sequences, or all of them if there are fewer, each at most once, as a sample of the mixture."""
        assert self.samples is not None, "a batch is added before any is drawn"
        rows = torch.randperm(len(self), generator=self.generator)[:n]
        samples = self.samples.select(rows.to(self.samples.tokens.device)).trimmed()
        return Batch(samples, self.features[rows], POOLED, base_share=self.base_share)

    def state(self) -> dict[str, Any]:
        """Everything, for a checkpoint."""
        kept = {} if self.samples is None else {name: getattr(self.samples, name) for name in TENSORS}
        own = {"features": self.features, "from_base": self.from_base, "generator": self.generator.get_state()}
        return {**kept, **own}

    def restore(self, state: dict[str, Any]) -> None:
        """Put back what ``state`` gave."""
        self.features, self.from_base = state["features"], state["from_base"]
        self.generator.set_state(state["generator"])
        if "tokens" in state:
            rows = {name: state[name].to(self.like.tokens.device) for name in TENSORS}
            self.samples = replace(self.like, **rows)


class Reuse:
    """What the further updates of a step train on: the batch itself, or as many sequences of the pool.

    The pool is left alone once KL(p‖π) on fresh batches has risen for certain.
    """

    def __init__(self, iterations: int, pool_size: int, seed: int, like: Samples) -> None:
        self.iterations = iterations
        self.pool = Pool(pool_size, seed, like) if pool_size else None
        self.falling = Falling()

    def after(self, batch: Batch, kl: float) -> Iterator[Batch]:
        """The batches after the first update on ``batch``, which gave this estimate of KL(p‖π) before it."""
        if self.pool is not None:
            self.pool.add(batch)
            self.falling.note(kl)
        for _ in range(self.iterations - 1):
            if self.pool is None:
                yield batch.after_update()
            elif self.falling.holds:
                yield self.pool.draw(len(batch.samples))

    def state(self) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Tensors and numbers for a checkpoint."""
        return self.pool.state() if self.pool else None, {"seen": [*self.falling.seen], "holds": self.falling.holds}

    def restore(self, tensors: dict[str, Any] | None, numbers: dict[str, Any]) -> None:
        """Put back what ``state`` gave."""
        if self.pool is not None and tensors:
            self.pool.restore(tensors)
        self.falling.seen.extend(numbers["seen"])
        self.falling.holds = numbers["holds"]


class Falling:
    """Whether KL(p‖π) on sequences that the policy has not trained on still falls, or has begun to rise for certain.

    Reuse overfits at last: forty tokens multiply every error. So a rise between the last ``STRETCH`` fresh batches and
    those before them, by more than ``ERRORS`` standard errors, ends it.
    """

    def __init__(self) -> None:
        self.seen: deque[float] = deque(maxlen=2 * STRETCH)
        self.holds = True

    def note(self, kl: float) -> None:
        """One fresh batch's estimate, before the policy trains on it."""
        if math.isfinite(kl):
            self.seen.append(kl)
        if len(self.seen) == 2 * STRETCH:
            before, after = torch.tensor([*self.seen], dtype=torch.float64).reshape(2, STRETCH).unbind()
            error = ((before.var() + after.var()) / STRETCH).sqrt()
            self.holds = self.holds and float(after.mean() - before.mean()) <= ERRORS * float(error)


def check_pool(args: TrainingArguments, iterations: int, objective: Objective, rule: ProposalRule) -> None:
    """Raises UsageError where a pool would do nothing, or where its samples come from laws that it does not mix."""
    if not args.pool:
        return
    if iterations < 2:
        raise UsageError("training.pool: nothing trains on it; set training.num_iterations to 2 or more")
    if not isinstance(objective, Guided) or rule.first != "guided":
        raise UsageError(
            "training.pool: it mixes samples of the base and of the guided base, whose laws one pass tells; use method "
            "guided with its own proposal, or leave pool out"
        )


def mixture(base: Tensor, guide: Tensor, base_share: float) -> Tensor:
    """Log-probabilities of tokens [N, T] under α a + (1 − α) g, from those under base and guide [N, T].

    The mixture is of whole sequences: of a prefix it is α a(x_≤t) + (1 − α) g(x_≤t), and a token's is their quotient.
    """
    prefixes = []
    for law, share in ((base, base_share), (guide, 1 - base_share)):
        if share > 0:
            prefixes.append(law.double().cumsum(-1) + math.log(share))
    total = torch.stack(prefixes).logsumexp(0)
    return torch.diff(total, prepend=torch.zeros_like(total[:, :1]), dim=-1)
