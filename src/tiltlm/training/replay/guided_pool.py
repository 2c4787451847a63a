"""The pool of guided distillation: past batches trained on again, weighed as drawn from the mixture of their two laws.

Of n sequences, a share α came from the base a and the others from the guided base g. However each was drawn, together
they are a sample of m = α a + (1 − α) g (Owen & Zhou 2000), and P/m stays below P/(α a) and P/((1 − α) g) at once.
Since g may lean as training goes on, both laws are read anew each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tiltlm.lm import Samples
from tiltlm.lm.samples import TENSORS
from tiltlm.training.rollout_batch import Batch

POOLED = "pool"


class Rows:
    """Samples of any batch of a run as rows of one table: unguided, with all prompts of ``like`` in its order."""

    def __init__(self, like: Samples) -> None:
        self.like = replace(like, guide=None)
        self.places = {name: place for place, name in enumerate(like.prompts.ids)}

    def of(self, samples: Samples, token_logprob: Tensor) -> Samples:
        """These samples, with ``token_logprob`` [N, T] for the law that drew them."""
        ids = samples.prompts.ids
        here = torch.tensor([self.places[ids[i]] for i in samples.prompt_index.tolist()])
        rows = replace(self.like, **{name: getattr(samples, name) for name in TENSORS})
        return replace(rows, proposal_logprob=token_logprob, prompt_index=here.to(samples.tokens.device))

    def restored(self, state: Mapping[str, Any]) -> Samples | None:
        """The rows of a checkpoint; None where it has none."""
        if "tokens" not in state:
            return None
        return replace(self.like, **{name: state[name].to(self.like.tokens.device) for name in TENSORS})


class Pool:
    """The last ``size`` sequences of base and guided base, with their features, in memory; drawn from by ``seed``.

    A sequence of T tokens with K features takes 13 T + 8 K bytes. ``like`` are samples of the same run, with all of its
    prompts.
    """

    def __init__(self, size: int, seed: int, like: Samples) -> None:
        self.size, self.rows = size, Rows(like)
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
        samples = self.rows.of(batch.samples, batch.samples.proposal_logprob)
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

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state`` gave."""
        self.features, self.from_base = state["features"], state["from_base"]
        self.generator.set_state(state["generator"])
        self.samples = self.rows.restored(state)
