"""`tiltlm sample --sampler`: a sampler of the target of a run, or of a config without a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from tiltlm.app.build import build_base
from tiltlm.app.display import Display
from tiltlm.app.fit import fit_run_target
from tiltlm.app.load import load_run
from tiltlm.app.plan import plan_run
from tiltlm.app.prompts import encode_prompts, read_prompts
from tiltlm.config.prompt_data import PromptData
from tiltlm.config.run import RunConfig, load_config
from tiltlm.estimation import Estimate
from tiltlm.lm import Roles
from tiltlm.reports.tables import estimate
from tiltlm.runs.directory import RunDirectory
from tiltlm.sampling import Forecast, Sampler, TargetSampler, build_proposal
from tiltlm.sampling.target_proposal import SOURCE_NAMES
from tiltlm.sampling.target_sampler import MAX_DRAWS, PILOT_DRAWS
from tiltlm.targets import BaseSample, Target
from tiltlm.training.checkpoint import load_base_sample

# Estimates below the first number are shown with an exponent; below the second they are rounding errors.
SMALL, ROUNDING = 1e-4, 1e-9


@dataclass(frozen=True)
class TextsRequest:
    """``n`` texts of a target by a ``sampler``; None stands for the default of the run or of the sampler."""

    n: int
    sampler: Sampler
    proposal: str | None = None
    prompt: str | None = None
    max_completion_length: int | None = None
    seed: int | None = None
    pilot: int = PILOT_DRAWS
    max_draws: int = MAX_DRAWS


def sampler_of_run(run: RunDirectory, request: TextsRequest, device: str) -> TargetSampler:
    """A sampler of a finished run's target, with its base, its tuned model and the samples of its fit.

    Raises UsageError, CheckpointError.
    """
    config, roles, target = load_run(run, device)
    with roles.use("base") as base:
        base_sample = load_base_sample(run.checkpoint_dir, base)
    data = read_prompts(config).training if request.prompt is None else None
    return _sampler(request, config, roles, target, base_sample, data, policy=True)


def sampler_of_config(
    path: Path, overrides: Sequence[str], request: TextsRequest, device: str, display: Display
) -> TargetSampler:
    """A sampler of a config's target, which is fitted first. Raises UsageError, UnreachableTargetError."""
    config = load_config(path, [*overrides, *([f"device={device}"] if device != "auto" else [])])
    plan = plan_run(config)
    base = build_base(config)
    fitted = fit_run_target(plan, base, display)
    for warning in fitted.report.warnings:
        display.say(f"note: {warning}")
    roles, data = Roles(base, base=base), plan.prompts.training
    return _sampler(request, config, roles, fitted.target, fitted.base_sample, data, policy=False)


def _sampler(
    request: TextsRequest,
    config: RunConfig,
    roles: Roles,
    target: Target,
    base_sample: BaseSample | None,
    data: PromptData | None,
    *,
    policy: bool,
) -> TargetSampler:
    """A sampler on ``request.prompt`` or else the prompts of ``data``; with ``policy`` the tuned model may propose."""
    with roles.use("base") as base:
        prompts = base.encode_prompts(request.prompt) if request.prompt is not None else encode_prompts(base, data)
    source = build_proposal(
        request.proposal or request.sampler.required_source,
        roles,
        target,
        policy=policy,
        base_sample=base_sample,
        prompts=prompts,
        max_completion_length=request.max_completion_length or config.max_completion_length,
    )
    return TargetSampler(
        source, request.sampler, request.n, seed=request.seed, pilot=request.pilot, max_draws=request.max_draws
    )


def forecast_table(forecast: Forecast) -> Table:
    """The forecast for the accepted texts, and for comparison the figures of all draws of the proposal."""
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
