"""A sampler of the target of a run, or of a config that was never tuned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from tiltlm.app.build import build_base
from tiltlm.app.display import Display
from tiltlm.app.fit import fit_run_target
from tiltlm.app.load import load_run
from tiltlm.app.plan import plan_run
from tiltlm.app.prompts import encode_prompts, read_prompts
from tiltlm.config.run import RunConfig, load_config
from tiltlm.estimation import Estimate
from tiltlm.lm import Roles
from tiltlm.reports.tables import estimate
from tiltlm.runs.directory import RunDirectory
from tiltlm.sampling import Forecast, Sampler, TargetSampler, build_proposal
from tiltlm.sampling.target_proposal import SOURCE_NAMES
from tiltlm.targets import BaseSample, Target
from tiltlm.training.checkpoint import load_base_sample

# Estimates below the first number are shown with an exponent; below the second they are rounding errors.
SMALL, ROUNDING = 1e-4, 1e-9


def sampler_of_run(run: RunDirectory, n: int, device: str, **settings: Any) -> TargetSampler:
    """A sampler of a finished run's target, with its base, its tuned model and the samples that it was fitted on.

    Raises UsageError, CheckpointError.
    """
    config, roles, target = load_run(run, device)
    with roles.use("base") as base:
        base_sample = load_base_sample(run.checkpoint_dir, base)
    return _sampler(config, roles, target, base_sample, n, policy=True, **settings)


def sampler_of_config(
    path: Path, overrides: Sequence[str], n: int, device: str, display: Display, **settings: Any
) -> TargetSampler:
    """A sampler of a config's target, fitted on samples of the base now. Raises UsageError, UnreachableTargetError."""
    config = load_config(path, [*overrides, *([f"device={device}"] if device != "auto" else [])])
    plan = plan_run(config)
    base = build_base(config)
    fitted = fit_run_target(plan, base, display)
    for warning in fitted.report.warnings:
        display.say(f"note: {warning}")
    return _sampler(config, Roles(base, base=base), fitted.target, fitted.base_sample, n, policy=False, **settings)


def _sampler(
    config: RunConfig,
    roles: Roles,
    target: Target,
    base_sample: BaseSample | None,
    n: int,
    *,
    policy: bool,
    rule: Sampler,
    proposal: str | None,
    prompt: str | None,
    max_completion_length: int | None,
    **settings: Any,
) -> TargetSampler:
    with roles.use("base") as base:
        prompts = (
            base.encode_prompts(prompt) if prompt is not None else encode_prompts(base, read_prompts(config).training)
        )
    source = build_proposal(
        proposal or rule.required_source,
        roles,
        target,
        policy=policy,
        base_sample=base_sample,
        prompts=prompts,
        max_completion_length=max_completion_length or config.max_completion_length,
    )
    return TargetSampler(source, rule, n, **settings)


def forecast_table(forecast: Forecast) -> Table:
    """The forecast for the texts, beside that of all draws of the proposal."""
    table = Table(box=None, pad_edge=False)
    for column in ("", "texts", SOURCE_NAMES[forecast.source]):
        table.add_column(column, justify="left" if not column else "right")
    texts, draws = forecast.closeness, forecast.proposal_closeness
    table.add_row("KL(p‖·), nats", _shown(texts.kl), _shown(draws.kl))
    table.add_row("TV(p, ·)", _shown(texts.tv), _shown(draws.tv))
    table.add_row("acceptance", _shown(forecast.acceptance), "")
    table.add_row(f"draws for {forecast.texts:,} texts", f"about {forecast.draws:,}", "")
    table.add_row(f"ESS of {forecast.proposals:,} pilot draws", "", _shown(forecast.ess))
    if forecast.prompts > 1:
        table.add_row("prompts of the pilot", "", f"{forecast.prompts:,}")
    return table


def _shown(value: Estimate) -> str:
    if ROUNDING <= abs(value.value) < SMALL:
        return f"{value.value:.1e} ± {value.se:.0e}"
    return f"< {ROUNDING:g}" if 0 < abs(value.value) < ROUNDING else estimate(value.to_json())
