"""Samples of the base with the values of the target's features; the coefficients are fitted on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tiltlm.features import Batch, Feature, measure_batch
from tiltlm.lm import LanguageModel, Prompts, Samples
from tiltlm.rollouts import LocalRollouts, RolloutsOf
from tiltlm.targets.target import Target


@dataclass(frozen=True)
class BaseSample:
    """N samples of the base with the values [N, K] of the target's features; λ is fitted on them.

    ``max_completion_length`` is the length at which they were cut, a part of their distribution. ``base_logprob``
    [N, T] is log a of their tokens where that is not the samples' own log q: guides drew some of them, or an engine
    whose log-probabilities are not exact. The ``plain`` first rows are the base's own draws. ``forward_passes`` counts
    the further passes that this took.
    """

    samples: Samples
    features: Tensor
    max_completion_length: int
    base_logprob: Tensor | None = None
    plain: int | None = None
    forward_passes: int = 0

    @property
    def from_base(self) -> bool:
        """Whether the base drew all samples."""
        return self.base_logprob is None or self.plain == len(self.samples)

    @property
    def log_ratio(self) -> Tensor:
        """log a(x) − log q(x) [N] in float64: 0 for samples of the base."""
        if self.base_logprob is None:
            return torch.zeros(len(self.samples), dtype=torch.float64)
        return (self.base_logprob - self.samples.proposal_logprob).double().sum(-1).cpu()

    @property
    def prefix_log_ratio(self) -> Tensor | None:
        """log a(x_<t) − log q(x_<t) [N, T] before each token; None for samples of the base."""
        if self.base_logprob is None:
            return None
        log_ratio = (self.base_logprob - self.samples.proposal_logprob).double().cpu()
        return log_ratio.cumsum(-1) - log_ratio

    def log_weights(self, target: Target) -> Tensor:
        """log P(x) − log q(x) [N] in float64, −inf outside the target's support."""
        base_logprob = self.samples.sequence_logprob.cpu() + self.log_ratio
        return target.log_score(base_logprob, self.features).double() - base_logprob + self.log_ratio

    def select(self, rows: Tensor) -> BaseSample:
        """These rows."""
        here = rows.to(self.samples.tokens.device)
        base_logprob = self.base_logprob[here] if self.base_logprob is not None else None
        return replace(self, samples=self.samples.select(here), features=self.features[rows], base_logprob=base_logprob)

    def of_the_base(self) -> BaseSample:
        """The samples that the base itself drew, all with weight 1."""
        if self.base_logprob is None:
            return self
        rows = torch.arange(self.plain or 0)
        own = self.select(rows)
        assert own.base_logprob is not None
        samples = replace(own.samples, proposal_logprob=own.base_logprob, exact=True)
        return BaseSample(samples, own.features, self.max_completion_length)


def draw_base_sample(
    base: LanguageModel,
    features: Sequence[Feature],
    n: int,
    prompts: str | Sequence[str] | Prompts | None = None,
    max_completion_length: int = 40,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    *,
    samples_per_prompt: int = 1,
    rollouts: RolloutsOf = LocalRollouts,
) -> BaseSample:
    """Draw ``n`` completions of the base, the prompts in turn and in fair order, and measure the features on them.

    ``samples_per_prompt`` of one prompt are drawn before the next one's turn. The base reads samples of ``rollouts``
    that are not exact.
    """
    prompts = prompts if isinstance(prompts, Prompts) else base.encode_prompts(prompts)
    base.check_length(prompts, max_completion_length)
    prompts = prompts.select(prompts.fair_order(n, seed, samples_per_prompt))
    drawn = rollouts(base).generate(
        prompts,
        n,
        seed=seed,
        max_completion_length=max_completion_length,
        samples_per_prompt=samples_per_prompt,
        progress=progress,
    )
    return measured_base_sample(base, features, drawn, max_completion_length)


def measured_base_sample(
    base: LanguageModel, features: Sequence[Feature], drawn: Samples, max_completion_length: int
) -> BaseSample:
    """Draws of the base with their features; the base reads them unless they are exact."""
    values = measure_samples(features, drawn)
    if drawn.exact:
        return BaseSample(drawn, values, max_completion_length)
    with torch.no_grad():
        base_logprob = base.logprob(drawn)
    return BaseSample(drawn, values, max_completion_length, base_logprob, len(drawn), len(drawn))


def measure_samples(features: Sequence[Feature], samples: Samples) -> Tensor:
    """Feature values [N, K] of completions, float64 on the CPU; raises FeatureError."""
    return measure_batch(features, feature_batch(samples))


def feature_batch(samples: Samples) -> Batch:
    """Completions as features read them: texts, token ids, prompts and the prompts' columns."""
    chats = samples.prompts.messages
    return Batch(
        samples.texts,
        [prompt or "" for prompt in samples.prompt_texts],
        samples.completion_ids,
        samples.columns,
        [chats[i] for i in samples.prompt_index.tolist()] if chats is not None else None,
    )
