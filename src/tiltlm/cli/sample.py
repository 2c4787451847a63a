"""`tiltlm sample`: texts of a model, or of a target without tuning."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from tiltlm.cli.common import Device, Overrides, quiet, run_of, terminal
from tiltlm.errors import UsageError

if TYPE_CHECKING:
    from tiltlm.app.sample_target import TextsRequest
    from tiltlm.lm import Samples

SourceOrConfig = Annotated[
    str,
    typer.Argument(
        metavar="RUN_DIR|MODEL|CONFIG.yaml",
        help="a run, or embedded, a model folder, a hub name; with --sampler a run or a config",
    ),
]
PLAIN = {"top_p": 1.0, "top_k": 0, "temperature": 1.0}


def sample(
    source: SourceOrConfig,
    overrides: Overrides = None,
    n: Annotated[int, typer.Option("-n", min=1, help="number of texts")] = 10,
    top_p: Annotated[float, typer.Option(help="keep the most likely tokens with this total probability; 1: all")] = 1.0,
    top_k: Annotated[int, typer.Option(help="keep this number of most likely tokens; 0: all")] = 0,
    temperature: Annotated[float, typer.Option(help="below 1: a sharper distribution, above 1: a flatter one")] = 1.0,
    prompt: Annotated[
        str | None, typer.Option(help="text to continue; default with --sampler: the prompts of the run")
    ] = None,
    max_completion_length: Annotated[
        int | None, typer.Option(min=1, help="in tokens; default: that of the run, or 40")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="default: another one each time")] = None,
    device: Device = "auto",
    jsonl: Annotated[
        bool, typer.Option("--jsonl", help="one JSON object per line: prompt, text, logprob, tokens (and log_weight)")
    ] = False,
    sampler: Annotated[
        str | None, typer.Option(help="draw from the target itself: rejection, qrs, resample, mcmc or guided")
    ] = None,
    proposal: Annotated[
        str | None,
        typer.Option(help="what the sampler draws from: base, guided or policy; default: the one with the largest ESS"),
    ] = None,
    pilot: Annotated[
        int | None, typer.Option(min=2, help="draws of the pilot, on which the forecast rests; default: 2048")
    ] = None,
    max_draws: Annotated[int | None, typer.Option(min=1, help="the most draws; default: 1000000")] = None,
    log_beta: Annotated[
        float | None, typer.Option(help="qrs: log β, the bound of log P/q; rejection: a bound that you know to hold")
    ] = None,
    acceptance: Annotated[
        float | None, typer.Option(help="qrs: acceptance rate; default: the rate with KL(p‖p_β) ≤ 0.01 nats")
    ] = None,
    oversample: Annotated[int | None, typer.Option(help="resample: draws per text; default: 32")] = None,
    chains: Annotated[int | None, typer.Option(help="mcmc: chains per prompt; default: 8")] = None,
    burn_in: Annotated[int | None, typer.Option(help="mcmc: first steps, which are dropped; default: 100")] = None,
    thin: Annotated[int | None, typer.Option(help="mcmc: steps between texts; default: 10")] = None,
    qrs_curve: Annotated[
        Path | None,
        typer.Option(help="qrs: write divergence against acceptance to a .csv, or a .png or .svg with a .csv"),
    ] = None,
) -> None:
    """Print texts of a run's tuned model, of any model, or, with --sampler, of a target without tuning."""
    rule = {
        "log_beta": log_beta,
        "acceptance": acceptance,
        "oversample": oversample,
        "chains": chains,
        "burn_in": burn_in,
        "thin": thin,
    }
    bounds = {"pilot": pilot, "max_draws": max_draws}
    if sampler is None:
        others = {"proposal": proposal, **bounds, **rule, "qrs_curve": qrs_curve}
        _refuse(others, dict.fromkeys(others), "needs --sampler, which draws texts of the target itself")
        if overrides:
            raise UsageError(f"'{overrides[0]}': overrides need a config, and a config needs --sampler")
        decoding = {"top_p": top_p, "top_k": top_k, "temperature": temperature}
        _sample_model(source, n, prompt, seed, max_completion_length, device, decoding, jsonl)
        return
    _refuse(
        {"top_p": top_p, "top_k": top_k, "temperature": temperature},
        PLAIN,
        "does not go with --sampler, which draws from p",
    )
    from tiltlm.app.sample_target import TextsRequest
    from tiltlm.sampling import build_sampler

    built = build_sampler(sampler, **{name: value for name, value in rule.items() if value is not None})
    given = {name: value for name, value in bounds.items() if value is not None}
    request = TextsRequest(n, built, proposal, prompt, max_completion_length, seed, **given)
    _sample_target(source, overrides or [], request, device, jsonl, qrs_curve)


def _refuse(given: dict[str, Any], usual: dict[str, Any], reason: str) -> None:
    for name, value in given.items():
        if value != usual[name]:
            raise UsageError(f"--{name.replace('_', '-')}: {reason}")


def _sample_model(
    source: str,
    n: int,
    prompt: str | None,
    seed: int | None,
    max_completion_length: int | None,
    device: str,
    decoding: dict[str, Any],
    jsonl: bool,
) -> None:
    if Path(source).is_file():
        raise UsageError(
            f"'{source}' is a file; give the directory of a run or a model, or a name on the hub; for a config, add "
            f"--sampler, which draws texts of its target without tuning"
        )
    run = run_of(source)
    from tiltlm.app.load import load_policy
    from tiltlm.lm import LanguageModel, SamplingSettings
    from tiltlm.rollouts import LocalRollouts

    quiet()
    length = 40
    if run is None:
        model = LanguageModel.from_pretrained(source, device=device)
    else:
        config, model = load_policy(run, device)
        length = config.max_completion_length
    drawn = LocalRollouts(model).generate(
        model.encode_prompts(prompt),
        n,
        seed=seed,
        max_completion_length=max_completion_length or length,
        settings=SamplingSettings(**decoding),
    )
    _write(drawn, jsonl)


def _sample_target(
    source: str, overrides: list[str], request: TextsRequest, device: str, jsonl: bool, curve: Path | None
) -> None:
    """Print the forecast, then the texts as they are found."""
    from tiltlm.app.display import Display
    from tiltlm.app.qrs_curve import check_path, write_curve
    from tiltlm.app.sample_target import forecast_table, sampler_of_config, sampler_of_run

    if curve is not None:
        if request.sampler.name != "qrs":
            raise UsageError(f"--qrs-curve: needs --sampler qrs (it is {request.sampler.name})")
        check_path(curve)
    console, out = terminal(), None if sys.stdout.isatty() else sys.stdout
    display = Display(console)
    quiet()
    if Path(source).is_file():
        sampler = sampler_of_config(Path(source), overrides, request, device, display)
    else:
        run = run_of(source)
        if run is None:
            raise UsageError(f"'{source}' is a model, which has no target; --sampler needs a run or a config")
        if overrides:
            raise UsageError(f"'{overrides[0]}': overrides need a config, and '{source}' is a run")
        sampler = sampler_of_run(run, request, device)
    with display.counting("pilot") as progress:
        forecast = sampler.forecast(progress)
    console.print(sampler.sampler.description(forecast.source), soft_wrap=True)
    console.print(forecast_table(forecast))
    for note in forecast.notes:
        console.print(f"note: {note}", soft_wrap=True)
    if curve is not None:
        for path in write_curve(curve, sampler.qrs_curve(), forecast.acceptance.value):
            console.print(f"wrote {path}", soft_wrap=True)
    try:
        with display.counting("texts") as progress:
            for found in sampler.texts(progress):
                # In a terminal the progress bar moves below the texts; a file or a pipe gets the texts alone.
                _write(found.samples, jsonl, found.log_weights.tolist(), out)
    finally:
        if sampler.found < request.n:
            console.print(
                f"stopped: {sampler.found:,} of {request.n:,} texts from {sampler.drawn:,} draws", soft_wrap=True
            )
    console.print(f"{request.n:,} texts from {sampler.drawn:,} draws", soft_wrap=True)


def _write(drawn: Samples, jsonl: bool, log_weights: list[float] | None = None, file: TextIO | None = None) -> None:
    columns = drawn.prompt_texts, drawn.texts, drawn.sequence_logprob.tolist(), drawn.lengths.tolist()
    for i, (prompt, text, logprob, tokens) in enumerate(zip(*columns, strict=True)):
        if jsonl:
            row = {"prompt": prompt, "text": text, "logprob": logprob, "tokens": tokens}
            if log_weights is not None:
                row["log_weight"] = log_weights[i] if math.isfinite(log_weights[i]) else None
            typer.echo(json.dumps(row, ensure_ascii=False), file=file)
        else:
            typer.echo((prompt or "") + text, file=file)
