"""The target of a run, fitted on samples of the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tiltlm.app.display import Display
from tiltlm.app.plan import RunPlan
from tiltlm.app.prompts import encode_prompts
from tiltlm.config.run import RunConfig
from tiltlm.errors import UnreachableTargetError
from tiltlm.guides.rare_events import RareEventEstimate, estimate_rare_event, rare_filters
from tiltlm.guides.refit import needs_refit, refit
from tiltlm.lm import LanguageModel
from tiltlm.targets import (
    BaseSample,
    FitReport,
    FittedTarget,
    Target,
    Term,
    draw_base_sample,
    fit_target,
    report_fit,
)
from tiltlm.training.checkpoint import load_base_sample

# Each use of randomness has its own seeds, so that no two draw the same numbers.
STREAMS = {"fit": 1, "train": 2, "evaluate": 3, "eval_command": 5, "guided_fit": 6, "reference": 7, "curve": 8}


@dataclass(frozen=True)
class RunTarget:
    """The target of a run, fitted or the user's own, with its base samples and the report of its fit."""

    target: Target
    base_sample: BaseSample
    report: FitReport


def stream(seed: int, use: str) -> int:
    """The seed of one use of randomness in a run."""
    return seed * 1_000 + STREAMS[use]


def goals(report: FitReport) -> dict[str, float | None]:
    """The wanted mean of each feature, by name."""
    return {term.name: term.goal for term in report.terms}


def fit_run_target(
    plan: RunPlan, base: LanguageModel, display: Display, checkpoint_dir: Path | None = None
) -> RunTarget:
    """Fit the target of a run on samples of the base, drawn now or loaded from ``checkpoint_dir``.

    Raises UnreachableTargetError if the samples cannot reach the moments.
    """
    config = plan.config
    sample = load_base_sample(checkpoint_dir, base) if checkpoint_dir is not None else None
    if sample is None:
        prompts = encode_prompts(base, plan.prompts.training)
        with display.counting("sampling the base") as progress:
            sample = draw_base_sample(
                base,
                plan.features,
                config.target.samples,
                prompts,
                config.max_completion_length,
                stream(config.fit_seed, "fit"),
                progress,
                samples_per_prompt=config.training.samples_per_prompt or 1,
            )
    if plan.own_target is not None:
        return RunTarget(plan.own_target, sample, report_fit(plan.own_target, sample))
    found = _rare_events(config, base, plan.terms, sample, display) if sample.from_base else None
    if found is not None and found.reliable:
        sample = found.base_sample
    try:
        fitted = fit_target(plan.terms, sample)
    except UnreachableTargetError as error:
        raise UnreachableTargetError(f"{error} {found.advice() if found else ''}".strip()) from error
    if sample.from_base and needs_refit(fitted):
        fitted = _refitted(config, base, fitted, display)
    return RunTarget(fitted, fitted.base_sample, fitted.report)


def _refitted(config: RunConfig, base: LanguageModel, fitted: FittedTarget, display: Display) -> FittedTarget:
    """The target, fitted again with guided texts; prints a note on the change."""
    with display.counting("refitting with guided texts") as progress:
        again = refit(base, fitted, seed=stream(config.fit_seed, "guided_fit"), progress=progress)
    before, after = fitted.report, again.report
    display.say(
        f"note: {before.ess.value:.0f} of {before.samples:,} texts of the base carry the target's weight (ESS), so "
        f"{after.samples - before.samples:,} guided texts were added: the ESS is now {after.ess.value:.0f}, and "
        f"KL(p‖a) is {after.kl_p_a.value:.2f} nats (before: {before.kl_p_a.value:.2f})"
    )
    return again


def _rare_events(
    config: RunConfig, base: LanguageModel, terms: Sequence[Term], sample: BaseSample, display: Display
) -> RareEventEstimate | None:
    """The rare-event estimate of the filters; None if enough samples pass them."""
    filters = rare_filters(terms, sample)
    if not filters:
        return None
    with display.counting("drawing guided texts that pass the filters") as progress:
        found = estimate_rare_event(
            base,
            filters,
            [term.feature for term in terms],
            sample,
            seed=stream(config.fit_seed, "guided_fit"),
            progress=progress,
        )
    names = " and ".join(f"'{feature.name}'" for feature in filters)
    display.say(f"note: hardly any text of the base passes {names}. {found.advice()}")
    return found
