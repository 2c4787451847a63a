"""Refit a target on guided texts (adaptive importance sampling), where a few samples carry most of its weight.

Coefficients are fitted on samples of the base, and a tilt may put most of its weight on texts that hardly any sample
shows. The error bars of the fit do not include this. A guide toward the fitted target draws such texts, and λ is fitted
again on the mixture of all distributions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from tiltlm.estimation import mixture
from tiltlm.guides.estimate import guide_toward
from tiltlm.lm import Guide, LanguageModel, Samples, SamplingSettings
from tiltlm.lm.token_scores import token_logprobs
from tiltlm.rollouts import LocalRollouts, RolloutsOf
from tiltlm.targets.base_sample import BaseSample, measure_samples
from tiltlm.targets.constrain import FittedTarget, fit_target

# Above this relative standard error of the ESS a few texts carry most of the weight.
MAX_ESS_ERROR = 0.15


def needs_refit(fitted: FittedTarget) -> bool:
    """Whether a few samples carry the weight of a target that has moments and a feature with an automaton.

    False with several prompts, because each would need guided texts of its own.
    """
    moments = any(term.kind == "moment" for term in fitted.terms)
    guidable = any(feature.automaton() is not None for feature in fitted.features)
    single, ess = len(fitted.base_sample.samples.prompts) == 1, fitted.report.ess
    return moments and guidable and single and ess.se > MAX_ESS_ERROR * ess.value


def refit(
    base: LanguageModel,
    fitted: FittedTarget,
    *,
    n: int = 512,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    rollouts: RolloutsOf = LocalRollouts,
) -> FittedTarget:
    """The target, fitted again on the samples of the base and 2 ``n`` guided texts, each with its importance weight.

    A guide gives the texts that it was estimated from too much probability, and so too little weight. So the samples
    are split in halves. The guide of one half weights the other half and its own new texts.
    """
    sample, length = fitted.base_sample, fitted.base_sample.max_completion_length
    halves, parts = [sample.select(torch.arange(start, len(sample.samples), 2)) for start in (0, 1)], list[BaseSample]()
    for i, (own, other) in enumerate((halves, halves[::-1])):
        guide = base.placed(guide_toward(base, fitted, own))
        drawn = rollouts(base).generate(
            own.samples.prompts, n, seed=seed + i, max_completion_length=length, guide=guide
        )
        values = torch.cat([other.features, measure_samples(fitted.features, drawn)])
        texts = [other.samples, replace(drawn, guide=None)]
        parts.append(as_mixture(base, texts, values, [guide], length, len(own.samples)))
        if progress is not None:
            progress((i + 1) * n, 2 * n)
    return fit_target(fitted.terms, _concatenate(parts))


def _concatenate(parts: Sequence[BaseSample]) -> BaseSample:
    """Samples of several mixtures as one, the base's own first; each text keeps the distribution of its part."""
    plain = [part.plain or 0 for part in parts]
    pieces = [p.select(torch.arange(k)) for p, k in zip(parts, plain, strict=True)]
    pieces += [p.select(torch.arange(k, len(p.samples))) for p, k in zip(parts, plain, strict=True)]
    width = max(piece.samples.tokens.shape[1] for piece in pieces)
    logprobs = [pad(p.base_logprob, (0, width - p.base_logprob.shape[1])) for p in pieces if p.base_logprob is not None]
    return BaseSample(
        Samples.concatenate([piece.samples for piece in pieces]),
        torch.cat([piece.features for piece in pieces]),
        parts[0].max_completion_length,
        torch.cat(logprobs),
        sum(plain),
        sum(part.forward_passes for part in parts),
    )


def as_mixture(
    base: LanguageModel,
    texts: Sequence[Samples],
    features: Tensor,
    guides: Sequence[Guide],
    length: int,
    forward_passes: int,
) -> BaseSample:
    """Texts of the base, then of the base under each guide, as one sample of the mixture of these distributions.

    ``features`` [N, K] are those of all texts. ``forward_passes`` counts the passes made before; one pass of each text
    under each distribution is added.
    """
    together = Samples.concatenate(texts)
    logprobs = _logprobs(base, together, guides)
    weights = [_mixture_weight(part, together) for part in texts]
    mixed = replace(together, proposal_logprob=mixture(logprobs, weights).to(together.tokens.device))
    forward_passes += len(logprobs) * len(together)
    return BaseSample(mixed, features, length, logprobs[0].to(together.tokens.device), len(texts[0]), forward_passes)


def _mixture_weight(part: Samples, together: Samples) -> Tensor:
    """The fraction [N] of the samples of each row's prompt that are in ``part``."""
    count = len(together.prompts)
    in_part, in_all = (torch.bincount(x.prompt_index, minlength=count).double() for x in (part, together))
    return (in_part / in_all.clamp_min(1))[together.prompt_index]


@torch.no_grad()
def _logprobs(base: LanguageModel, samples: Samples, guides: Sequence[Guide]) -> list[Tensor]:
    """Token log-probabilities [N, T] under the base and under the base with each guide, in one forward pass."""
    rows, width, distributions = base.chunks(samples), samples.tokens.shape[1], [None, *guides]
    found: list[list[Tensor]] = [[] for _ in distributions]
    with base.cast_once():
        for chunk in (samples.select(r).trimmed() for r in rows):
            forward = base.read(chunk)
            for scores, guide in zip(found, distributions, strict=True):
                scored = token_logprobs(chunk, forward, SamplingSettings(), guide).double()
                scores.append(pad(scored, (0, width - scored.shape[1])))
    back = torch.cat(rows).argsort()
    return [torch.cat(scores)[back] for scores in found]
