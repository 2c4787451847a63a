"""`tiltlm eval`: measure the tuned model of a run, or any model, on fresh samples."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from tiltlm.cli.common import AsJson, Device, Source, quiet, run_of, terminal
from tiltlm.errors import UsageError


def evaluate(
    source: Source,
    samples: Annotated[int, typer.Option(min=2, help="number of fresh samples")] = 2048,
    seed: Annotated[int, typer.Option(min=0, help="seed of the samples")] = 0,
    top_p: Annotated[float | None, typer.Option(help="also measure the moments under top-p sampling")] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="a file of prompts, or one prompt; default: the held-out or else the training prompts of the run"
        ),
    ] = None,
    max_completion_length: Annotated[
        int | None, typer.Option(min=1, help="in tokens; default: that of the run, or 40")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Measure the tuned model of a run, or any model, on fresh samples."""
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"--top-p: {top_p} must lie in (0, 1]")
    run = run_of(source)
    from tiltlm.app.display import Display
    from tiltlm.app.evaluate import EvaluationRequest, evaluate_run, evaluate_source
    from tiltlm.reports.tables import evaluation_table

    quiet()
    with Display(terminal()).counting(f"sampling {source}") as progress:
        request = EvaluationRequest(samples, seed, prompts, max_completion_length, device, progress)
        found = evaluate_source(source, request) if run is None else evaluate_run(run, request, top_p)
    if as_json:
        typer.echo(json.dumps(found.to_json()))
    else:
        terminal(stderr=False).print(evaluation_table(found.to_json()))
