"""Rare-event estimate: how often the base passes its filters, and texts that pass, where hardly any sample does.

The chain over the features' automata knows edges that no sample took, so its guide leads to texts that pass. Texts of
the base and of guided bases together are a sample of the mixture of their distributions. A target is fitted on them as
on samples of the base, each with its importance weight. The weights are exact whatever the chain leaves out. Each
round's texts improve the guide of the next one (adaptive importance sampling).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tiltlm.estimation import Estimate, Strata, effective_sample_size, log_partition
from tiltlm.features import Feature
from tiltlm.guides.chain import MarkovChain
from tiltlm.guides.refit import as_mixture
from tiltlm.guides.token_states import build_token_states
from tiltlm.guides.value import build_guide
from tiltlm.lm import Guide, LanguageModel, Samples, SamplingSettings
from tiltlm.rollouts import LocalRollouts, RolloutsOf
from tiltlm.targets.base_sample import BaseSample, measure_samples
from tiltlm.targets.target import Term

# An estimate of Z from fewer effective samples is not reliable.
MIN_ESS = 10.0
# With this many passing samples of the base no guide is needed.
ENOUGH_PASSING = 30.0


@dataclass(frozen=True)
class RareEventEstimate:
    """The last round's ``guided_samples`` with their ``log_weights`` log a − log g [N], −inf where a filter fails.

    ``base_sample`` holds the texts of the base and of all rounds as one sample of the mixture of their distributions.
    ``log_z`` is the log of the base's pass rate, estimated from all of them; −inf where none passes.
    """

    guide: Guide
    guided_samples: Samples
    log_weights: Tensor
    base_sample: BaseSample
    log_z: Estimate

    @property
    def hits(self) -> int:
        """How many of the guided samples pass all filters."""
        return int((self.log_weights > -math.inf).sum())

    @property
    def ess(self) -> float:
        """The effective sample size of the guided samples; 0 where none passes."""
        return effective_sample_size(self.log_weights).value if self.hits else 0.0

    @property
    def reliable(self) -> bool:
        """Whether the weights are even enough to fit a target on these texts."""
        return self.ess >= MIN_ESS

    def advice(self) -> str:
        """The result and what to do about it, in two or three sentences."""
        n = len(self.guided_samples)
        if not self.reliable:
            return (
                f"With a guide {self.hits} of {n} texts pass, but their weights are too uneven for an estimate "
                f"(ESS {self.ess:.1f}): the base hardly ever writes such a text. Choose a looser feature, or a prompt "
                f"that leads to it."
            )
        rate, error = math.exp(self.log_z.value), self.log_z.se
        return (
            f"With a guide {self.hits} of {n} texts pass. By their weights the base passes at a rate of {rate:.2g} "
            f"(± {100 * error:.0f} %): about {math.ceil(30 / rate):,} samples of the base would contain 30 that pass."
        )


def rare_filters(terms: Sequence[Term], sample: BaseSample) -> list[Feature]:
    """The filters of a target, where too few samples pass all of them and one has an automaton; else an empty list."""
    filters = [k for k, term in enumerate(terms) if term.kind == "filter"]
    features = [terms[k].feature for k in filters]
    if not filters or all(feature.automaton() is None for feature in features):
        return []
    passed = (sample.features[:, filters] > 0).all(1)
    strata = Strata.of(sample.samples.prompt_ids, len(passed))
    return features if float(strata.sum(passed.double()).mean()) < ENOUGH_PASSING / strata.count else []


def estimate_rare_event(
    base: LanguageModel,
    filters: Sequence[Feature],
    features: Sequence[Feature],
    sample: BaseSample,
    *,
    n: int = 512,
    rounds: int = 3,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    rollouts: RolloutsOf = LocalRollouts,
) -> RareEventEstimate:
    """Estimate how often the base passes all ``filters``, from a ``sample`` of it in which hardly any text passes.

    Draws ``rounds`` times ``n`` guided completions and measures all ``features`` of the target on them. Each round's
    guide uses the rounds before. Raises UsageError where no filter has an automaton.
    """
    length, plain = sample.max_completion_length, sample.samples
    states = build_token_states(base, filters, plain)
    chain = MarkovChain.empty(states, length, base.device)
    chain.add_samples(base, plain)
    filter_columns = [k for k, feature in enumerate(features) if feature in filters]
    texts, measured, guides = [plain], [sample.features], list[Guide]()
    log_weights = torch.empty(0)
    for i in range(rounds):
        guides.append(base.placed(build_guide(states, chain.values(states.passing()), states.passing())))
        drawn = rollouts(base).generate(plain.prompts, n, seed=seed + i, max_completion_length=length, guide=guides[-1])
        values = measure_samples(features, drawn)
        with torch.no_grad():
            log_ratio = (base.logprob(drawn, settings=SamplingSettings()) - drawn.proposal_logprob).double().cpu()
        log_weights = torch.where((values[:, filter_columns] > 0).all(1), log_ratio.sum(-1), -math.inf)
        if i + 1 < rounds:
            chain.add_samples(base, drawn, log_ratio.cumsum(-1) - log_ratio)
        texts.append(replace(drawn, guide=None))
        measured.append(values)
        if progress is not None:
            progress((i + 1) * n, rounds * n)
    # One pass of each text for the chain, except for the last round, and one of each guided text for its weight.
    forward_passes = len(plain) + (2 * rounds - 1) * n
    mixed = as_mixture(base, texts, torch.cat(measured), guides, length, forward_passes)
    passed = torch.where((mixed.features[:, filter_columns] > 0).all(1), mixed.log_ratio, -math.inf)
    log_z = log_partition(passed) if bool((passed > -math.inf).any()) else Estimate(-math.inf, math.nan)
    return RareEventEstimate(guides[-1], drawn, log_weights, mixed, log_z)
