"""Foresight: how rare a filter is, and texts that pass it, where hardly a sample of the base does.

The chain of the features' automata knows the steps that no sample took, so its guide leads there. Texts of the guided
base, together with the base's own, are a sample of the mixture of their laws: the target is fitted on it like on the
base's, each text with its weight. The guide is exact to sample from and to score, whatever the chain leaves out; what
it draws shows states that were unknown, and the next guide is better.
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
from tiltlm.targets.base_sample import BaseSample, measure_samples
from tiltlm.targets.target import Term

# Below so many effective samples an estimate of Z is no estimate.
TRUSTED = 10.0
# With so many effective samples that pass, no guide need look for more.
ENOUGH_HITS = 30.0


@dataclass(frozen=True)
class RareEventEstimate:
    """Guided ``samples`` of the last round with log a − log g [N], −inf where a filter fails.

    ``sample`` holds all texts, the base's and the guided ones of every round, as one sample of the mixture of their
    laws; ``log_z``, the log of the share of the base's texts that pass, is told by all of them, −inf without a hit.
    """

    guide: Guide
    guided_samples: Samples
    log_weights: Tensor
    base_sample: BaseSample
    log_z: Estimate

    @property
    def hits(self) -> int:
        """How many of the samples pass all filters."""
        return int((self.log_weights > -math.inf).sum())

    @property
    def ess(self) -> float:
        """The effective number of samples; 0 without a hit."""
        return effective_sample_size(self.log_weights).value if self.hits else 0.0

    @property
    def reliable(self) -> bool:
        """Whether the weights are even enough for a target to be fitted on these texts."""
        return self.ess >= TRUSTED

    def advice(self) -> str:
        """What it found, and what to do about it, in one sentence or two."""
        n = len(self.guided_samples)
        if not self.reliable:
            return (
                f"Guided toward it, {self.hits} of {n} texts pass, but their weights are too uneven for an estimate "
                f"(ESS {self.ess:.1f}): the base hardly ever writes it. Start from a looser feature, or from a prompt "
                f"that brings it about."
            )
        rate, error = math.exp(self.log_z.value), self.log_z.se
        return (
            f"Guided toward it, {self.hits} of {n} texts pass, and tell that the base passes at a rate of {rate:.2g} "
            f"(± {100 * error:.0f} %): about {math.ceil(30 / rate):,} samples of it would hold thirty."
        )


def rare_filters(terms: Sequence[Term], sample: BaseSample) -> list[Feature]:
    """The filters of a target, where too few samples pass all of them and one can be read off a prefix; else none."""
    filters = [k for k, term in enumerate(terms) if term.kind == "filter"]
    features = [terms[k].feature for k in filters]
    if not filters or all(feature.automaton() is None for feature in features):
        return []
    passed = (sample.features[:, filters] > 0).all(1)
    strata = Strata.of(sample.samples.prompt_ids, len(passed))
    return features if float(strata.sum(passed.double()).mean()) < ENOUGH_HITS / strata.count else []


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
) -> RareEventEstimate:
    """How often the base passes all ``filters``, from its ``sample``, though hardly a text of it does.

    Draws ``rounds`` times ``n`` guided completions, each round with a guide that has learnt from those before, and
    measures all ``features`` of the target on them. Raises UsageError where the filters cannot be read off a prefix.
    """
    length, plain = sample.max_completion_length, sample.samples
    states = build_token_states(base, filters, plain)
    chain = MarkovChain.empty(states, length, base.device)
    chain.learn(base, plain)
    wanted = [k for k, feature in enumerate(features) if feature in filters]
    texts, measured, guides = [plain], [sample.features], list[Guide]()
    log_weights = torch.empty(0)
    for i in range(rounds):
        guides.append(base.placed(build_guide(states, chain.promise(states.passing()), states.passing())))
        drawn = base.sample(n, plain.prompts, seed + i, max_completion_length=length, guide=guides[-1])
        values = measure_samples(features, drawn)
        with torch.no_grad():
            log_ratio = (base.logprob(drawn, settings=SamplingSettings()) - drawn.proposal_logprob).double().cpu()
        log_weights = torch.where((values[:, wanted] > 0).all(1), log_ratio.sum(-1), -math.inf)
        if i + 1 < rounds:
            chain.learn(base, drawn, log_ratio.cumsum(-1) - log_ratio)
        texts.append(replace(drawn, guide=None))
        measured.append(values)
        if progress is not None:
            progress((i + 1) * n, rounds * n)
    # Those of the chain, one for each round, and those of the mixture.
    forward_passes = len(plain) + (2 * rounds - 1) * n
    mixed = as_mixture(base, texts, torch.cat(measured), guides, length, forward_passes)
    passed = torch.where((mixed.features[:, wanted] > 0).all(1), mixed.log_ratio, -math.inf)
    log_z = log_partition(passed) if bool((passed > -math.inf).any()) else Estimate(-math.inf, math.nan)
    return RareEventEstimate(guides[-1], drawn, log_weights, mixed, log_z)
