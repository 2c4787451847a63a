"""`tiltlm sample`: texts of a model, or of a target itself."""

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
    from tiltlm.lm import Samples

Anything = Annotated[
    str,
    typer.Argument(
        metavar="RUN_DIR|MODEL|CONFIG.yaml",
        help="a run, or embedded, a model folder, a hub name; with --sampler a run, or a config that was never tuned",
    ),
]
PLAIN = {"top_p": 1.0, "top_k": 0, "temperature": 1.0}


def sample(
    source: Anything,
    overrides: Overrides = None,
    n: Annotated[int, typer.Option("-n", min=1, help="how many texts")] = 10,
    top_p: Annotated[float, typer.Option(help="keep the likeliest tokens with this mass; 1: all")] = 1.0,
    top_k: Annotated[int, typer.Option(help="keep this many likeliest tokens; 0: all")] = 0,
    temperature: Annotated[float, typer.Option(help="below 1 sharper, above 1 flatter")] = 1.0,
    prompt: Annotated[
        str | None, typer.Option(help="text to continue; with --sampler, by default the run's own")
    ] = None,
    max_completion_length: Annotated[
        int | None, typer.Option(min=1, help="tokens; default: the run's own, or 40")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="default: a new one each time")] = None,
    device: Device = "auto",
    jsonl: Annotated[
        bool, typer.Option("--jsonl", help="a JSON object a line: prompt, text, logprob, tokens (and log_weight)")
    ] = False,
    sampler: Annotated[
        str | None, typer.Option(help="texts of the target itself: rejection, qrs, resample, mcmc or guided")
    ] = None,
    proposal: Annotated[
        str | None, typer.Option(help="what the sampler draws from: base, guided or policy; default: the nearest")
    ] = None,
    pilot: Annotated[int | None, typer.Option(min=2, help="draws that say beforehand what to expect; 2048")] = None,
    max_draws: Annotated[int | None, typer.Option(min=1, help="give up before more; 1000000")] = None,
    log_beta: Annotated[
        float | None, typer.Option(help="qrs: log β, the bound of log P/q; rejection: one that you vouch for")
    ] = None,
    acceptance: Annotated[
        float | None, typer.Option(help="qrs: acceptance rate; default: the rate with KL(p‖p_β) ≤ 0.01 nats")
    ] = None,
    oversample: Annotated[int | None, typer.Option(help="resample: draws for each text; 32")] = None,
    chains: Annotated[int | None, typer.Option(help="mcmc: chains for each prompt; 8")] = None,
    burn_in: Annotated[int | None, typer.Option(help="mcmc: first steps thrown away; 100")] = None,
    thin: Annotated[int | None, typer.Option(help="mcmc: steps from text to text; 10")] = None,
    qrs_curve: Annotated[
        Path | None, typer.Option(help="qrs: divergence against acceptance, as .csv, or .png or .svg with a .csv")
    ] = None,
) -> None:
    """Write texts of a run's tuned model, of any model, or, with --sampler, of a target without tuning."""
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
        _refuse(others, dict.fromkeys(others), "goes with --sampler, which draws texts of the target itself")
        if overrides:
            raise UsageError(f"'{overrides[0]}': overrides go with a config, and a config with --sampler")
        decoding = {"top_p": top_p, "top_k": top_k, "temperature": temperature}
        _sample_model(source, n, prompt, seed, max_completion_length, device, decoding, jsonl)
        return
    _refuse(
        {"top_p": top_p, "top_k": top_k, "temperature": temperature},
        PLAIN,
        "not with --sampler, which draws from p",
    )
    from tiltlm.sampling import build_sampler

    settings = {name: value for name, value in rule.items() if value is not None}
    work: dict[str, Any] = {
        "rule": build_sampler(sampler, **settings),
        "proposal": proposal,
        "prompt": prompt,
        "max_completion_length": max_completion_length,
        "seed": seed,
        **{name: value for name, value in bounds.items() if value is not None},
    }
    _sample_target(source, overrides or [], n, device, jsonl, qrs_curve, work)


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
            f"'{source}' is a file; give the directory of a run or a model, or a name on the hub; of a config, "
            f"--sampler draws texts of the target without tuning"
        )
    run = run_of(source)
    from tiltlm.app.load import load_policy
    from tiltlm.lm import LanguageModel

    quiet()
    length = 40
    if run is None:
        model = LanguageModel.from_pretrained(source, device=device)
    else:
        config, model = load_policy(run, device)
        length = config.max_completion_length
    drawn = model.sample(n, prompt, seed, max_completion_length=max_completion_length or length, **decoding)
    _write(drawn, jsonl)


def _sample_target(
    source: str,
    overrides: list[str],
    n: int,
    device: str,
    jsonl: bool,
    curve: Path | None,
    work: dict[str, Any],
) -> None:
    """Say what the texts will be like, then write them as they are found."""
    from tiltlm.app.display import Display
    from tiltlm.app.qrs_curve import check_path, write_curve
    from tiltlm.app.sample_target import forecast_table, sampler_of_config, sampler_of_run

    if curve is not None:
        if work["rule"].name != "qrs":
            raise UsageError(f"--qrs-curve: goes with --sampler qrs, not with {work['rule'].name}")
        check_path(curve)
    console, out = terminal(), None if sys.stdout.isatty() else sys.stdout
    display = Display(console)
    quiet()
    if Path(source).is_file():
        sampler = sampler_of_config(Path(source), overrides, n, device, display, **work)
    else:
        run = run_of(source)
        if run is None:
            raise UsageError(f"'{source}' is a model, which has no target; --sampler needs a run or a config")
        if overrides:
            raise UsageError(f"'{overrides[0]}': overrides go with a config, and '{source}' is a run")
        sampler = sampler_of_run(run, n, device, **work)
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
                # A terminal's bar moves aside for what is written; a file or a pipe gets the texts past it.
                _write(found.samples, jsonl, found.log_weights.tolist(), out)
    finally:
        if sampler.found < n:
            console.print(f"stopped: {sampler.found:,} of {n:,} texts from {sampler.drawn:,} draws", soft_wrap=True)
    console.print(f"{n:,} texts from {sampler.drawn:,} draws", soft_wrap=True)


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
