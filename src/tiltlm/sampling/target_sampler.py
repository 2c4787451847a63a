"""Texts of the target itself, drawn without tuning: first a forecast of what they will be, then the texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.errors import UnreachableTargetError, UsageError
from tiltlm.estimation import no_hit
from tiltlm.lm import LanguageModel, Prompts, Roles, Samples
from tiltlm.sampling.forecast import CurvePoint, Forecast, foretell, qrs_curve
from tiltlm.sampling.registry import build_sampler
from tiltlm.sampling.sampler import Acceptance, Sampler
from tiltlm.sampling.target_proposal import CALLED, Draws, TargetProposal, build_proposal
from tiltlm.targets import BaseSample, FittedTarget, Target

PILOT = 2_048
# A pilot looks at so many prompts at most, so that it has draws enough of each.
PILOT_PROMPTS = 16
MAX_DRAWS = 1_000_000
# Draws that are made at once.
ROUND = 1_024
# Of something that n draws did not show, the share is below this many by n, at 95%.
RULE_OF_THREE = 3.0
# Seeds of samplers are none of those that a target may have been fitted on: λ suits the draws that it was fitted on.
SEED_OFFSET = 2**40

Told = Callable[[int, int], None]


@dataclass(frozen=True)
class TargetSamples:
    """Texts with their log-weights, log P(x) − log q(x) [N], what was foretold of them, and how many draws they took.

    ``samples`` carry the log-probabilities of the proposal q that they were drawn from.
    """

    samples: Samples
    log_weights: Tensor
    forecast: Forecast
    draws: int


class TargetSampler:
    """Draws ``n`` texts of a proposal's target, the prompts taken in turn.

    The pilot's draws become texts too, unless they decided on β. No more than ``max_draws`` are drawn in all; ``drawn``
    and ``found`` say how far it is. What is held at once does not grow with ``n``.
    """

    def __init__(
        self,
        proposal: TargetProposal,
        sampler: Sampler,
        n: int,
        *,
        seed: int | None = None,
        pilot: int = PILOT,
        max_draws: int = MAX_DRAWS,
    ) -> None:
        for name, value, least in (("n", n, 1), ("pilot", pilot, 2), ("max_draws", max_draws, 1)):
            if value < least:
                raise UsageError(f"{name}: {value} must be at least {least}")
        if sampler.only_source is not None and sampler.only_source != proposal.source:
            raise UsageError(
                f"proposal: {sampler.name} takes draws of {CALLED[sampler.only_source]}, not of "
                f"{CALLED[proposal.source]}; "
                + (
                    "no bound of P(x)/q(x) is known there, and qrs needs none"
                    if sampler.only_source == "base"
                    else "leave the proposal out"
                )
            )
        seed = torch.Generator().seed() % SEED_OFFSET if seed is None else seed
        self.proposal, self.sampler, self.n, self.max_draws = proposal, sampler, n, max_draws
        self.generator = torch.Generator(proposal.roles.policy.device).manual_seed(SEED_OFFSET + 2 * seed)
        self.choices = torch.Generator().manual_seed(SEED_OFFSET + 2 * seed + 1)
        count = len(proposal.prompts.texts)
        turns = proposal.prompts.fair_order(n, seed).tolist()[:n]
        self.texts_of = {place: n // count + (turn < n % count) for turn, place in enumerate(turns)}
        self.pilot_places = turns[:PILOT_PROMPTS]
        self.pilot_size = -(-pilot // len(self.pilot_places)) * len(self.pilot_places)
        self.drawn = self.found = 0
        self.weights: dict[int, Tensor] = {}
        self._pilot: Draws | None = None
        self._forecast: Forecast | None = None

    def forecast(self, progress: Told | None = None) -> Forecast:
        """What the texts will be like, from a pilot that is drawn at the first call; ``progress`` is told its draws.

        Raises UsageError where the sampler cannot work, UnreachableTargetError where no draw hits the target.
        """
        if self._forecast is not None:
            return self._forecast
        parts, keeps = [], self.sampler.keeps_pilot
        while self.drawn < self.pilot_size:
            each = min(self.pilot_size - self.drawn, ROUND) // len(self.pilot_places)
            parts.append(self._draw(each * len(self.pilot_places), self.pilot_places))
            if progress is not None:
                progress(self.drawn, self.pilot_size)
        pilot = Draws.concatenate(parts)
        self.weights = {place: draws.log_weights for place, draws in pilot.by_prompt()}
        if all(map(no_hit, self.weights.values())):
            share = RULE_OF_THREE / self.pilot_size
            raise UnreachableTargetError(
                f"none of {self.pilot_size:,} draws of {CALLED[self.proposal.source]} lies in the target's support, "
                f"so fewer than {share:.1g} of them do, and {self.n:,} texts would take more than "
                f"{math.ceil(self.n / share):,} draws. A larger pilot would say more; a guided base, or a tuned "
                f"policy, is nearer to the target"
            )
        source = self.proposal.source
        self.sampler = self.sampler.settled(list(self.weights.values()), self.proposal.target, source)
        self._forecast = foretell(self.sampler, self.proposal, self.weights, self.texts_of, pilot_kept=keeps)
        self._pilot = pilot if keeps else None
        return self._forecast

    def qrs_curve(self) -> list[CurvePoint]:
        """Divergence against acceptance of quasi-rejection with this proposal, from the pilot."""
        self.forecast()
        return qrs_curve(list(self.weights.values()), len(self.weights) == len(self.texts_of))

    def texts(self, progress: Told | None = None) -> Iterator[Draws]:
        """The texts as they are found, ``n`` in all; ``progress`` is told how many there are.

        Raises UnreachableTargetError where they would take, or have taken, more than ``max_draws`` draws.
        """
        forecast = self.forecast()
        if forecast.draws > self.max_draws:
            raise self._too_many(f"take about {forecast.draws:,} draws")
        rate = forecast.acceptance.value
        acceptances = {place: self.sampler.begin(n, rate, self.choices) for place, n in self.texts_of.items()}
        draws, self._pilot = self._pilot, None
        while self.found < self.n:
            for place, part in (draws or self._round(acceptances)).by_prompt():
                given = acceptances[place].take(part) if acceptances[place].left else None
                if given is not None:
                    self.found += len(given)
                    yield given
            draws = None
            if progress is not None:
                progress(self.found, self.n)

    def _round(self, acceptances: Mapping[int, Acceptance]) -> Draws:
        """The next draws, equally many for each prompt that still needs some."""
        places = [place for place, acceptance in acceptances.items() if acceptance.left][:ROUND]
        wanted = max(math.ceil(acceptances[place].wanted) for place in places)
        size = len(places) * max(1, min(wanted, ROUND // len(places)))
        if self.drawn + size > self.max_draws:
            needed = f"take about {math.ceil(self.n * self.drawn / self.found):,}" if self.found else "take many more"
            raise self._too_many(f"{needed} draws; {self.found:,} were found in {self.drawn:,}")
        return self._draw(size, places)

    def _draw(self, size: int, places: Sequence[int]) -> Draws:
        draws = self.proposal.draw(size, places, self.generator)
        self.drawn += size
        return draws

    def _too_many(self, what: str) -> UnreachableTargetError:
        return UnreachableTargetError(
            f"max_draws: no more than {self.max_draws:,} draws are allowed, and {self.n:,} texts {what}. Allow more, "
            f"ask for fewer texts, or choose another sampler, or a proposal nearer to the target"
        )


def sample_target(
    base: LanguageModel,
    target: Target,
    n: int,
    *,
    sampler: str | Sampler = "qrs",
    proposal: str | None = None,
    policy: LanguageModel | None = None,
    base_sample: BaseSample | None = None,
    prompts: str | Sequence[str] | Prompts | None = None,
    max_completion_length: int | None = None,
    seed: int | None = None,
    pilot: int = PILOT,
    max_draws: int = MAX_DRAWS,
    progress: Told | None = None,
) -> TargetSamples:
    """Draw ``n`` texts of ``target``, or of a law near it that is said, without tuning ``base``.

    ``sampler`` is rejection, qrs, resample, mcmc or guided, or one with settings, such as ``Metropolis(thin=20)``;
    ``proposal`` is base, guided or policy, by default the nearest at hand. Prompts and length are by default those that
    the target was fitted with; ``base_sample``, what it was fitted on, comes with a ``FittedTarget``. Raises UsageError
    for what cannot work together, UnreachableTargetError where ``max_draws`` are not enough.
    """
    rule = build_sampler(sampler) if isinstance(sampler, str) else sampler
    if base_sample is None and isinstance(target, FittedTarget):
        base_sample = target.base_sample
    if prompts is None and base_sample is not None:
        prompts = base_sample.samples.prompts
    if max_completion_length is None:
        max_completion_length = base_sample.max_completion_length if base_sample is not None else 40
    source = build_proposal(
        proposal or rule.only_source,
        Roles(policy or base, base=base),
        target,
        policy=policy is not None,
        base_sample=base_sample,
        prompts=prompts if isinstance(prompts, Prompts) else base.encode_prompts(prompts),
        max_completion_length=max_completion_length,
    )
    work = TargetSampler(source, rule, n, seed=seed, pilot=pilot, max_draws=max_draws)
    forecast = work.forecast()
    found = Draws.concatenate(list(work.texts(progress)))
    return TargetSamples(found.samples, found.log_weights, forecast, work.drawn)
