"""Texts of the base and of guided bases as one sample, and what a second look with a guide does for a fit.

Coefficients are fitted on what the base writes, and a tilt may put most of its weight on texts that hardly a sample
shows: of four rare topics, those that are about three. No error bar of the fit knows of them. A guide toward the fitted
target draws them, and on the mixture of all laws λ is fitted again.
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
from tiltlm.targets.base_sample import BaseSample, measure_samples
from tiltlm.targets.constrain import FittedTarget, fit_target

# Where the error of the ESS is more than this share of it, a few texts carry most of the weight.
UNSURE = 0.15


def needs_refit(fitted: FittedTarget) -> bool:
    """Whether a few samples carry the weight of a target with moments, of which a feature can be read off a prefix.

    It is for one prompt: with several each would need guided texts of its own.
    """
    moments = any(term.kind == "moment" for term in fitted.terms)
    readable = any(feature.automaton() is not None for feature in fitted.features)
    one, ess = len(fitted.base_sample.samples.prompts) == 1, fitted.report.ess
    return moments and readable and one and ess.se > UNSURE * ess.value


def refit(
    base: LanguageModel,
    fitted: FittedTarget,
    *,
    n: int = 512,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> FittedTarget:
    """The target fitted anew on the samples of the base and, with their weights, on 2 ``n`` of guides toward it.

    A guide finds the texts that it was made of likelier than others like them, and would weigh them too low. So that of
    one half of the samples weighs the other half, and what it draws itself.
    """
    first, length = fitted.base_sample, fitted.base_sample.max_completion_length
    halves, parts = [first.select(torch.arange(start, len(first.samples), 2)) for start in (0, 1)], list[BaseSample]()
    for i, (own, other) in enumerate((halves, halves[::-1])):
        guide = base.placed(guide_toward(base, fitted, own))
        drawn = base.sample(n, own.samples.prompts, seed + i, max_completion_length=length, guide=guide)
        values = torch.cat([other.features, measure_samples(fitted.features, drawn)])
        texts = [other.samples, replace(drawn, guide=None)]
        parts.append(as_mixture(base, texts, values, [guide], length, len(own.samples)))
        if progress is not None:
            progress((i + 1) * n, 2 * n)
    return fit_target(fitted.terms, _joined(parts))


def _joined(parts: Sequence[BaseSample]) -> BaseSample:
    """Samples of several mixtures as one, the base's own first; each text keeps the law of its part."""
    firsts = [part.plain or 0 for part in parts]
    pieces = [p.select(torch.arange(k)) for p, k in zip(parts, firsts, strict=True)]
    pieces += [p.select(torch.arange(k, len(p.samples))) for p, k in zip(parts, firsts, strict=True)]
    width = max(piece.samples.tokens.shape[1] for piece in pieces)
    of_base = [pad(p.base_logprob, (0, width - p.base_logprob.shape[1])) for p in pieces if p.base_logprob is not None]
    return BaseSample(
        Samples.concatenate([piece.samples for piece in pieces]),
        torch.cat([piece.features for piece in pieces]),
        parts[0].max_completion_length,
        torch.cat(of_base),
        sum(firsts),
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
    """Texts of the base and, after them, of each guide, with ``features`` [N, K], as drawn from the mixture of all.

    ``forward_passes`` were made before; those of the mixture, one of each text under each law, come to them.
    """
    together = Samples.concatenate(texts)
    under = _under(base, together, guides)
    shares = [_share(part, together) for part in texts]
    everything = replace(together, proposal_logprob=mixture(under, shares).to(together.tokens.device))
    forward_passes += len(under) * len(together)
    return BaseSample(everything, features, length, under[0].to(together.tokens.device), len(texts[0]), forward_passes)


def _share(part: Samples, together: Samples) -> Tensor:
    """Of the samples of each row's prompt, the share that are in ``part`` [N]."""
    count = len(together.prompts)
    of_part, of_all = (torch.bincount(x.prompt_index, minlength=count).double() for x in (part, together))
    return (of_part / of_all.clamp_min(1))[together.prompt_index]


@torch.no_grad()
def _under(base: LanguageModel, samples: Samples, guides: Sequence[Guide]) -> list[Tensor]:
    """Log-probabilities of the tokens [N, T] under the base, and under the base with each guide, in one pass."""
    rows, width, laws = base.chunks(samples), samples.tokens.shape[1], [None, *guides]
    found: list[list[Tensor]] = [[] for _ in laws]
    with base.cast_once():
        for chunk in (samples.select(r).trimmed() for r in rows):
            reading = base.read(chunk)
            for scores, guide in zip(found, laws, strict=True):
                scored = token_logprobs(chunk, reading, SamplingSettings(), guide).double()
                scores.append(pad(scored, (0, width - scored.shape[1])))
    back = torch.cat(rows).argsort()
    return [torch.cat(scores)[back] for scores in found]
