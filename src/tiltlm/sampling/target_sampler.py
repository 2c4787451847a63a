"""Draw texts of the target without tuning: a pilot and its forecast first, then the texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiltlm.errors import UnreachableTargetError, UsageError
from tiltlm.estimation import no_hit
from tiltlm.lm import LanguageModel, Prompts, Roles, Samples
from tiltlm.sampling.forecast import CurvePoint, Forecast, forecast_from_pilot, qrs_curve
from tiltlm.sampling.registry import build_sampler
from tiltlm.sampling.sampler import AcceptanceStep, Sampler
from tiltlm.sampling.target_proposal import SOURCE_NAMES, Draws, TargetProposal, build_proposal
from tiltlm.targets import BaseSample, FittedTarget, Target

PILOT_DRAWS = 2_048
# The most prompts of a pilot, so that each has enough draws.
PILOT_PROMPTS = 16
MAX_DRAWS = 1_000_000
# The most draws at once.
ROUND_DRAWS = 1_024
# An event that n draws did not show has a rate below this number / n, at 95 % confidence.
RULE_OF_THREE = 3.0
# Samplers use other seeds than fits, because λ is fitted to the noise of the draws of its own seed.
SEED_OFFSET = 2**40

# Called with the number done and the number in all.
ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class TargetSamples:
    """Texts with their log-weights log P(x) − log q(x) [N], their forecast, and the number of draws.

    ``samples`` carry the log-probabilities of the proposal q.
    """

    samples: Samples
    log_weights: Tensor
    forecast: Forecast
    draws: int


class TargetSampler:
    """Draws ``n`` texts of a proposal's target, the prompts in turn.

    Pilot draws become texts too, unless they determined β. There are at most ``max_draws`` draws in all; ``drawn`` and
    ``found`` count draws and texts. Memory does not grow with ``n``.
    """

    def __init__(
        self,
        proposal: TargetProposal,
        sampler: Sampler,
        n: int,
        *,
        seed: int | None = None,
        pilot: int = PILOT_DRAWS,
        max_draws: int = MAX_DRAWS,
    ) -> None:
        for name, value, least in (("n", n, 1), ("pilot", pilot, 2), ("max_draws", max_draws, 1)):
            if value < least:
                raise UsageError(f"{name}: {value} must be at least {least}")
        if sampler.required_source is not None and sampler.required_source != proposal.source:
            raise UsageError(
                f"proposal: {sampler.name} takes draws of {SOURCE_NAMES[sampler.required_source]}, not of "
                f"{SOURCE_NAMES[proposal.source]}; "
                + (
                    "no bound of P(x)/q(x) is known there, and qrs needs none"
                    if sampler.required_source == "base"
                    else "leave the proposal out"
                )
            )
        seed = torch.Generator().seed() % SEED_OFFSET if seed is None else seed
        self.proposal, self.sampler, self.n, self.max_draws = proposal, sampler, n, max_draws
        self.generator = torch.Generator(proposal.roles.policy.device).manual_seed(SEED_OFFSET + 2 * seed)
        self.acceptance_generator = torch.Generator().manual_seed(SEED_OFFSET + 2 * seed + 1)
        count = len(proposal.prompts.texts)
        turns = proposal.prompts.fair_order(n, seed).tolist()[:n]
        self.texts_by_prompt = {prompt: n // count + (turn < n % count) for turn, prompt in enumerate(turns)}
        self.pilot_prompts = turns[:PILOT_PROMPTS]
        self.pilot_size = -(-pilot // len(self.pilot_prompts)) * len(self.pilot_prompts)
        self.drawn = self.found = 0
        self.weights: dict[int, Tensor] = {}
        self._pilot: Draws | None = None
        self._forecast: Forecast | None = None

    def forecast(self, progress: ProgressCallback | None = None) -> Forecast:
        """The forecast for the texts, from a pilot that the first call draws; ``progress`` counts its draws.

        Raises UsageError where the sampler cannot work, UnreachableTargetError where no draw lies in the support.
        """
        if self._forecast is not None:
            return self._forecast
        parts, kept = [], self.sampler.keeps_pilot
        while self.drawn < self.pilot_size:
            each = min(self.pilot_size - self.drawn, ROUND_DRAWS) // len(self.pilot_prompts)
            parts.append(self._draw(each * len(self.pilot_prompts), self.pilot_prompts))
            if progress is not None:
                progress(self.drawn, self.pilot_size)
        pilot = Draws.concatenate(parts)
        self.weights = {prompt: draws.log_weights for prompt, draws in pilot.by_prompt()}
        if all(map(no_hit, self.weights.values())):
            rate = RULE_OF_THREE / self.pilot_size
            raise UnreachableTargetError(
                f"none of {self.pilot_size:,} draws of {SOURCE_NAMES[self.proposal.source]} lies in the target's "
                f"support, so fewer than {rate:.1g} of all draws do, and {self.n:,} texts would take more than "
                f"{math.ceil(self.n / rate):,} draws. Draw a larger pilot, or choose a proposal nearer to the target: "
                f"the guided base or a tuned policy"
            )
        source = self.proposal.source
        self.sampler = self.sampler.fit_pilot(list(self.weights.values()), self.proposal.target, source)
        self._forecast = forecast_from_pilot(
            self.sampler, self.proposal, self.weights, self.texts_by_prompt, pilot_kept=kept
        )
        self._pilot = pilot if kept else None
        return self._forecast

    def qrs_curve(self) -> list[CurvePoint]:
        """Divergence against acceptance of quasi-rejection with this proposal, from the pilot's weights."""
        self.forecast()
        return qrs_curve(list(self.weights.values()), len(self.weights) == len(self.texts_by_prompt))

    def texts(self, progress: ProgressCallback | None = None) -> Iterator[Draws]:
        """The texts as they are found, ``n`` in all; ``progress`` counts them.

        Raises UnreachableTargetError where the forecast is above ``max_draws``, or where the draws reach it.
        """
        forecast = self.forecast()
        if forecast.draws > self.max_draws:
            raise self._too_many(f"take about {forecast.draws:,} draws")
        rate, generator = forecast.acceptance.value, self.acceptance_generator
        steps = {prompt: self.sampler.start(n, rate, generator) for prompt, n in self.texts_by_prompt.items()}
        draws, self._pilot = self._pilot, None
        while self.found < self.n:
            for prompt, part in (draws or self._draw_round(steps)).by_prompt():
                accepted = steps[prompt].take(part) if steps[prompt].remaining else None
                if accepted is not None:
                    self.found += len(accepted)
                    yield accepted
            draws = None
            if progress is not None:
                progress(self.found, self.n)

    def _draw_round(self, steps: Mapping[int, AcceptanceStep]) -> Draws:
        """The next draws, equally many for each prompt whose texts are not complete."""
        prompts = [prompt for prompt, step in steps.items() if step.remaining][:ROUND_DRAWS]
        needed = max(math.ceil(steps[prompt].draws_needed) for prompt in prompts)
        size = len(prompts) * max(1, min(needed, ROUND_DRAWS // len(prompts)))
        if self.drawn + size > self.max_draws:
            total = f"take about {math.ceil(self.n * self.drawn / self.found):,}" if self.found else "take many more"
            raise self._too_many(f"{total} draws; {self.found:,} were found in {self.drawn:,}")
        return self._draw(size, prompts)

    def _draw(self, size: int, prompts: Sequence[int]) -> Draws:
        draws = self.proposal.draw(size, prompts, self.generator)
        self.drawn += size
        return draws

    def _too_many(self, what: str) -> UnreachableTargetError:
        return UnreachableTargetError(
            f"max_draws: at most {self.max_draws:,} draws are allowed, and {self.n:,} texts {what}. Allow more draws, "
            f"ask for fewer texts, or choose another sampler or a proposal nearer to the target"
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
    pilot: int = PILOT_DRAWS,
    max_draws: int = MAX_DRAWS,
    progress: ProgressCallback | None = None,
) -> TargetSamples:
    """Draw ``n`` texts of ``target``, exactly or with the distance from p that the forecast states, without tuning.

    ``sampler`` is rejection, qrs, resample, mcmc or guided, or a sampler with settings such as ``Metropolis(thin=20)``.
    ``proposal`` is base, guided or policy, by default the nearest available one. Prompts and length are by default
    those of the fit. ``base_sample``, on which the target was fitted, is part of a ``FittedTarget``. Raises UsageError
    for settings that do not go together, UnreachableTargetError where ``max_draws`` are not enough.
    """
    rule = build_sampler(sampler) if isinstance(sampler, str) else sampler
    if base_sample is None and isinstance(target, FittedTarget):
        base_sample = target.base_sample
    if prompts is None and base_sample is not None:
        prompts = base_sample.samples.prompts
    if max_completion_length is None:
        max_completion_length = base_sample.max_completion_length if base_sample is not None else 40
    source = build_proposal(
        proposal or rule.required_source,
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
