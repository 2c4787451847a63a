"""The forecast of a sampler, from the draws of a pilot: acceptance rate, distance from p, and number of draws."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.estimation import (
    Closeness,
    Estimate,
    acceptance_rate,
    accepted_closeness,
    chain_repeats,
    effective_sample_size,
    log_beta_for_acceptance,
    no_hit,
    pareto_k,
    pareto_k_threshold,
    proposal_closeness,
)
from tiltlm.sampling.metropolis import Metropolis
from tiltlm.sampling.rejection import QuasiRejection, Rejection
from tiltlm.sampling.sampler import Sampler
from tiltlm.sampling.target_proposal import Source, TargetProposal
from tiltlm.targets.constrain import ENOUGH_SAMPLES

# A note reports the repeat rate of chains above this.
NOTED_REPEAT_RATE = 0.05
CURVE_POINTS = 25


@dataclass(frozen=True)
class Forecast:
    """The forecast for ``texts`` texts, from ``proposals`` pilot draws; averages over the pilot's ``prompts``.

    ``acceptance`` is the acceptance rate of ``sampler``. ``closeness`` is the distance from p of the texts'
    distribution, ``proposal_closeness`` that of the proposal. ``ess`` is the effective sample size of the pilot.
    ``draws`` is the expected number of draws for all texts, with the pilot's. ``notes`` are for the user.
    """

    sampler: Sampler
    source: Source
    texts: int
    proposals: int
    prompts: int
    acceptance: Estimate
    closeness: Closeness
    proposal_closeness: Closeness
    ess: Estimate
    draws: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class CurvePoint:
    """Quasi-rejection sampling at one β: its acceptance rate, and KL and TV from p to p_β."""

    log_beta: float
    acceptance: Estimate
    closeness: Closeness


def forecast_from_pilot(
    sampler: Sampler,
    proposal: TargetProposal,
    weights: Mapping[int, Tensor],
    texts_by_prompt: Mapping[int, int],
    *,
    pilot_kept: bool,
) -> Forecast:
    """The forecast from the log-weights [N] of each prompt of a pilot, and the number of texts of every prompt.

    At least one log-weight must be above −inf.
    """
    complete = len(weights) == len(texts_by_prompt)
    rates = {prompt: sampler.acceptance_rate(row, texts_by_prompt[prompt]) for prompt, row in weights.items()}
    acceptance = average(list(rates.values()), complete)
    hit = {prompt: row for prompt, row in weights.items() if not no_hit(row)}
    sizes = [effective_sample_size(row) for row in hit.values()]
    ess = Estimate(sum(one.value for one in sizes), math.hypot(*(one.se for one in sizes)))
    support = {prompt: float((row > -math.inf).double().mean()) for prompt, row in weights.items()}
    # Prompts outside of the pilot, or without a draw in the support, are taken as average ones.
    usual = (acceptance.value, sum(support.values()) / len(support))
    known = {prompt: (rates[prompt].value, support[prompt]) for prompt in hit}
    expected = (sampler.expected_draws(n, *known.get(prompt, usual)) for prompt, n in texts_by_prompt.items())
    needed = math.ceil(sum(expected))
    proposals = sum(map(len, weights.values()))
    closeness = [sampler.closeness(row, texts_by_prompt[prompt]) for prompt, row in hit.items()]
    return Forecast(
        sampler=sampler,
        source=proposal.source,
        texts=sum(texts_by_prompt.values()),
        proposals=proposals,
        prompts=len(weights),
        acceptance=acceptance,
        closeness=_mean_closeness(closeness, complete),
        proposal_closeness=_mean_closeness([proposal_closeness(row) for row in hit.values()], complete),
        ess=ess,
        draws=max(proposals, needed) if pilot_kept else proposals + needed,
        notes=(*([proposal.reason] if proposal.reason else []), *_notes(sampler, list(weights.values()), ess)),
    )


def qrs_curve(weights: Sequence[Tensor], complete: bool = True, points: int = CURVE_POINTS) -> list[CurvePoint]:
    """Divergence against acceptance of quasi-rejection, at ``points`` acceptance rates evenly spaced on a log axis.

    The curve goes from the acceptance of all draws with P > 0 to that of exact rejection. ``weights`` are the
    log-weights [N] of each prompt; ``complete`` says whether these are all prompts.
    """
    hits = [row for row in weights if not no_hit(row)]
    lowest = min(float(row[row > -math.inf].min()) for row in hits)
    highest = max(float(row.max()) for row in hits)
    most, least = (average([acceptance_rate(row, b) for row in weights], True).value for b in (lowest, highest))
    log_betas = [highest]
    # Logarithms of equal weights differ by rounding.
    if highest - lowest > 1e-9:
        rates = torch.linspace(math.log(most), math.log(least), points, dtype=torch.float64).exp().tolist()
        log_betas = [lowest, *(log_beta_for_acceptance(weights, rate) for rate in rates[1:-1]), highest]
    found = []
    for log_beta in log_betas:
        rate = average([acceptance_rate(row, log_beta) for row in weights], complete)
        closeness = _mean_closeness([accepted_closeness(row, log_beta) for row in hits], complete)
        found.append(CurvePoint(log_beta, rate, closeness))
    return found


def average(estimates: Sequence[Estimate], complete: bool) -> Estimate:
    """The mean over prompts: over all of them where ``complete``, else over a sample of the prompts."""
    values = torch.tensor([one.value for one in estimates], dtype=torch.float64)
    count = len(values)
    if complete or count == 1:
        return Estimate(float(values.mean()), math.hypot(*(one.se for one in estimates)) / count)
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(count))


def _mean_closeness(each: Sequence[Closeness], complete: bool) -> Closeness:
    return Closeness(average([one.kl for one in each], complete), average([one.tv for one in each], complete))


def _notes(sampler: Sampler, weights: Sequence[Tensor], ess: Estimate) -> Iterator[str]:
    hits = [row for row in weights if not no_hit(row)]
    if len(hits) < len(weights):
        yield (
            f"{len(weights) - len(hits)} of the pilot's {len(weights)} prompts had no draw in the target's support; KL "
            f"and TV are those of the other prompts, and texts of these prompts may not be found at all"
        )
    if isinstance(sampler, Rejection) and not isinstance(sampler, QuasiRejection):
        return
    tails = [k for k in map(_heavy_tail, hits) if k is not None]
    if ess.value < ENOUGH_SAMPLES:
        yield (
            f"only {ess.value:.0f} of {sum(map(len, weights)):,} draws carry the target's weight (ESS), so KL and TV "
            f"may be larger than shown; a larger pilot shows this, and a proposal nearer to the target lowers them"
        )
    elif tails:
        yield (
            f"the pilot may have missed the largest weights (Pareto k̂ {max(tails):.2f}), so KL and TV may be larger "
            f"than shown; a larger pilot shows this"
        )
    if isinstance(sampler, Metropolis):
        rate = average([chain_repeats(row, sampler.thin) for row in hits], True).value
        if rate > NOTED_REPEAT_RATE:
            yield (
                f"about {rate:.0%} of the texts repeat the one before in their chain; a thin above {sampler.thin} "
                f"lowers this rate"
            )


def _heavy_tail(log_weights: Tensor) -> float | None:
    """Pareto k̂ where it is too large for this number of weights; None elsewhere, or where weights take few values."""
    hits = log_weights[log_weights > -math.inf]
    # Binary features give a few atoms and no tail, so a fitted k̂ means nothing.
    if 2 * len(torch.unique(hits.mul(1e6).round())) < len(hits):
        return None
    k = pareto_k(hits)
    return k if k > pareto_k_threshold(len(hits)) else None
