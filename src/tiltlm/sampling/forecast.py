"""What a pilot's draws say of a sampler before its texts are drawn."""

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
    accepted_law,
    chain_repeats,
    effective_sample_size,
    log_beta_for_acceptance,
    no_hit,
    pareto_k,
    pareto_k_threshold,
    proposal_law,
)
from tiltlm.sampling.metropolis import Metropolis
from tiltlm.sampling.rejection import QuasiRejection, Rejection
from tiltlm.sampling.sampler import Sampler
from tiltlm.sampling.target_proposal import Source, TargetProposal
from tiltlm.targets.constrain import ENOUGH_SAMPLES

# Chains that repeat themselves this often are worth a word.
OFTEN = 0.05
CURVE_POINTS = 25


@dataclass(frozen=True)
class Forecast:
    """What a pilot of ``proposals`` draws says of ``texts`` texts, on average over the ``prompts`` that it looked at.

    ``acceptance`` is the share of draws that ``sampler`` accepts; ``closeness`` is that of each text's law to p, and
    ``proposal_closeness`` that of q as it is. ``ess`` is the number of the pilot's draws that carry the target's
    weight, ``draws`` about what all texts will take, the pilot included; ``notes`` are for the user.
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
    """Quasi-rejection sampling at one β: the share that it accepts, and how near to p that is."""

    log_beta: float
    acceptance: Estimate
    closeness: Closeness


def foretell(
    sampler: Sampler,
    proposal: TargetProposal,
    weights: Mapping[int, Tensor],
    texts_of: Mapping[int, int],
    *,
    pilot_kept: bool,
) -> Forecast:
    """The forecast from the log-weights [N] of each prompt of a pilot; ``texts_of`` all prompts are wanted.

    At least one draw must hit the target.
    """
    whole = len(weights) == len(texts_of)
    rates = {place: sampler.rate(row, texts_of[place]) for place, row in weights.items()}
    acceptance = average(list(rates.values()), whole)
    hit = {place: row for place, row in weights.items() if not no_hit(row)}
    sizes = [effective_sample_size(row) for row in hit.values()]
    ess = Estimate(sum(one.value for one in sizes), math.hypot(*(one.se for one in sizes)))
    shares = {place: float((row > -math.inf).double().mean()) for place, row in weights.items()}
    # Prompts of which the pilot knows nothing are taken for average ones.
    usual = (acceptance.value, sum(shares.values()) / len(shares))
    known = {place: (rates[place].value, shares[place]) for place in hit}
    needed = math.ceil(sum(sampler.draws(n, *known.get(place, usual)) for place, n in texts_of.items()))
    proposals = sum(map(len, weights.values()))
    return Forecast(
        sampler=sampler,
        source=proposal.source,
        texts=sum(texts_of.values()),
        proposals=proposals,
        prompts=len(weights),
        acceptance=acceptance,
        closeness=_closeness([sampler.law(row, texts_of[place]) for place, row in hit.items()], whole),
        proposal_closeness=_closeness([proposal_law(row) for row in hit.values()], whole),
        ess=ess,
        draws=max(proposals, needed) if pilot_kept else proposals + needed,
        notes=(*([proposal.reason] if proposal.reason else []), *_notes(sampler, list(weights.values()), ess)),
    )


def qrs_curve(weights: Sequence[Tensor], whole: bool = True, points: int = CURVE_POINTS) -> list[CurvePoint]:
    """Divergence against acceptance, from all of the support accepted to nothing cut, evenly spread on a log axis.

    ``weights`` are log-weights [N] of each prompt, ``whole`` whether these are all prompts.
    """
    hits = [row for row in weights if not no_hit(row)]
    lowest = min(float(row[row > -math.inf].min()) for row in hits)
    highest = max(float(row.max()) for row in hits)
    most, least = (average([acceptance_rate(row, b) for row in weights], True).value for b in (lowest, highest))
    log_betas = [highest]
    # Logarithms of equal weights differ by rounding.
    if highest - lowest > 1e-9:
        steps = torch.linspace(math.log(most), math.log(least), points, dtype=torch.float64).exp().tolist()
        log_betas = [lowest, *(log_beta_for_acceptance(weights, rate) for rate in steps[1:-1]), highest]
    found = []
    for log_beta in log_betas:
        rate = average([acceptance_rate(row, log_beta) for row in weights], whole)
        found.append(CurvePoint(log_beta, rate, _closeness([accepted_law(row, log_beta) for row in hits], whole)))
    return found


def average(estimates: Sequence[Estimate], whole: bool) -> Estimate:
    """Over prompts: all of them (``whole``), or some that stand for others too."""
    values = torch.tensor([one.value for one in estimates], dtype=torch.float64)
    count = len(values)
    if whole or count == 1:
        return Estimate(float(values.mean()), math.hypot(*(one.se for one in estimates)) / count)
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(count))


def _closeness(laws: Sequence[Closeness], whole: bool) -> Closeness:
    return Closeness(average([law.kl for law in laws], whole), average([law.tv for law in laws], whole))


def _notes(sampler: Sampler, weights: Sequence[Tensor], ess: Estimate) -> Iterator[str]:
    hits = [row for row in weights if not no_hit(row)]
    if len(hits) < len(weights):
        yield (
            f"{len(weights) - len(hits)} of the pilot's {len(weights)} prompts had no draw in the target's support; KL "
            f"and TV are of the others, and of these prompts texts may not be found at all"
        )
    if isinstance(sampler, Rejection) and not isinstance(sampler, QuasiRejection):
        return
    tails = [k for k in map(_heavy_tail, hits) if k is not None]
    if ess.value < ENOUGH_SAMPLES:
        yield (
            f"only {ess.value:.0f} of {sum(map(len, weights)):,} draws carry the target's weight (ESS): KL and TV may "
            f"well be larger; a larger pilot would tell, and a proposal nearer to the target would lower them"
        )
    elif tails:
        yield (
            f"the largest weights may not have been seen yet (Pareto k̂ {max(tails):.2f}): KL and TV may well be "
            f"larger; a larger pilot would tell"
        )
    if isinstance(sampler, Metropolis):
        often = average([chain_repeats(row, sampler.thin) for row in hits], True).value
        if often > OFTEN:
            yield (
                f"about {often:.0%} of the texts repeat the one before in their chain; a larger thin than "
                f"{sampler.thin} would make them fewer"
            )


def _heavy_tail(log_weights: Tensor) -> float | None:
    """Pareto k̂ where it is too large for so many weights; None where it is not, or where weights take few values."""
    hits = log_weights[log_weights > -math.inf]
    # Of binary features they do: no tail, but a few atoms, of which the fit would make anything.
    if 2 * len(torch.unique(hits.mul(1e6).round())) < len(hits):
        return None
    k = pareto_k(hits)
    return k if k > pareto_k_threshold(len(hits)) else None
