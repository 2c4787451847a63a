"""The command line: thin, and quick to answer because it imports only what a command needs."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tiltlm.cli.common import AsJson, ConfigFile, Device, Overrides, Source, quiet, run_of, terminal
from tiltlm.cli.compare import compare
from tiltlm.cli.sample import sample
from tiltlm.errors import TiltError, UsageError

if TYPE_CHECKING:
    from tiltlm.evaluation.evaluate import Evaluation

app = typer.Typer(
    name="tiltlm",
    help="Tune a language model toward a distribution that you state, and see how close it got.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def tune(
    config: ConfigFile,
    overrides: Overrides = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="where the run goes; default: runs/NAME of the config")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on where the run in the output directory stopped")
    ] = False,
) -> None:
    """Tune a model toward the target of a config: the main job."""
    from tiltlm.config.run import load_config

    parsed = load_config(config, overrides or [])
    folder = output_dir or Path(parsed.output_dir or Path("runs") / config.stem)
    console = terminal()
    from tiltlm.app.tune import finished, tune_config
    from tiltlm.reports.tables import run_table

    quiet()
    directory = finished(parsed, folder) if resume else None
    if directory is not None:
        console.print(f"{folder} is done already; `tiltlm eval` measures it on fresh samples", soft_wrap=True)
    else:
        try:
            run = tune_config(parsed, folder, resume=resume, console=console)
            directory = run.directory if run.status == "done" else None
        except KeyboardInterrupt:
            pass
    if directory is None:
        again = ["tiltlm", "tune", str(config), *(overrides or []), "--output-dir", str(folder), "--resume"]
        if (folder / "run.json").exists():
            console.print(f"stopped; go on with: {shlex.join(again)}", soft_wrap=True)
        raise typer.Exit(130)
    console.print(run_table(directory.read_run()))
    typer.echo(f"model   {directory.policy_dir}")
    typer.echo(f"report  {directory.report_path}")


@app.command()
def fit(config: ConfigFile, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Fit the target only: coefficients, moments, ESS, and what will be hard, before any tuning."""
    from tiltlm.config.run import load_config

    parsed = load_config(config, overrides or [])
    from tiltlm.app.build import build_base, check_names
    from tiltlm.app.display import Display
    from tiltlm.app.fit import state_target
    from tiltlm.reports.tables import fit_table

    quiet()
    check_names(parsed)
    console = terminal()
    report = state_target(parsed, build_base(parsed), Display(console)).report
    record = report.to_json()
    if as_json:
        moments = {entry["name"]: entry["achieved"] for entry in record["features"]}
        typer.echo(json.dumps({"moments": moments, **record}))
        return
    terminal(stderr=False).print(fit_table(record))
    for warning in report.warnings:
        console.print(f"note: {warning}", soft_wrap=True)


@app.command("eval")
def evaluate(
    source: Source,
    samples: Annotated[int, typer.Option(min=2, help="fresh samples to draw")] = 2048,
    seed: Annotated[int, typer.Option(min=0, help="seed of the draw")] = 0,
    top_p: Annotated[float | None, typer.Option(help="also take the moments under top-p sampling")] = None,
    prompts: Annotated[
        str | None, typer.Option(help="a file of other prompts, or one prompt; default: the run's held-out or own ones")
    ] = None,
    max_completion_length: Annotated[
        int | None, typer.Option(min=1, help="tokens; default: the run's own, or 40")
    ] = None,
    device: Device = "auto",
    as_json: AsJson = False,
) -> None:
    """Draw fresh samples of a run's tuned model, or of any model, and measure them."""
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"--top-p: {top_p} must lie in (0, 1]")
    run = run_of(source)
    from tiltlm.app.display import Display
    from tiltlm.reports.tables import evaluation_table

    quiet()
    display = Display(terminal())
    with display.counting(f"sampling {source}") as progress:
        result: Evaluation
        if run is None:
            from tiltlm.app.build import encode_prompts, other_prompts
            from tiltlm.evaluation.evaluate import evaluate_model
            from tiltlm.lm import LanguageModel

            others = other_prompts(None, prompts) if prompts is not None else None
            model = LanguageModel.from_pretrained(source, device=device)
            result = evaluate_model(
                model,
                samples,
                prompts=encode_prompts(model, others),
                seed=seed,
                prompts_from=prompts or "none",
                max_completion_length=max_completion_length or 40,
                progress=progress,
            )
        else:
            from tiltlm.app.build import encode_prompts, other_prompts, read_prompts
            from tiltlm.app.fit import stream
            from tiltlm.app.load import load_run
            from tiltlm.evaluation.evaluate import HELD_OUT, TRAINING, evaluate_policy

            config, roles, target = load_run(run, device)
            split = read_prompts(config)
            known = (split.held_out, HELD_OUT) if split.held_out is not None else (split.training, TRAINING)
            data, prompts_from = known if prompts is None else (other_prompts(config, prompts), prompts)
            result = evaluate_policy(
                roles,
                target,
                samples,
                prompts=encode_prompts(roles.policy, data),
                max_completion_length=max_completion_length or config.max_completion_length,
                # Neither the run's own evaluation nor anything that it was trained on.
                seed=stream(config.seed, "eval") + 1_000_000 * (seed + 1),
                top_p=top_p,
                progress=progress,
                prompts_from=prompts_from,
            )
    if as_json:
        typer.echo(json.dumps(result.to_json()))
    else:
        terminal(stderr=False).print(evaluation_table(result.to_json()))


app.command()(sample)
app.command()(compare)


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="a run's directory")]) -> None:
    """Write report.html of a run; no model is loaded."""
    from tiltlm.reports.report import write_report

    typer.echo(str(write_report(run_dir)))


@app.command()
def init(name: Annotated[str, typer.Argument(metavar="[NAME]", help="name of the config to write")] = "tilt") -> None:
    """Write a commented config to start from."""
    from tiltlm.config.starter import starter_config

    path = Path(name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(starter_config())
    except FileExistsError as error:
        raise UsageError(f"{path} exists already; choose another NAME or delete it") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error}") from error
    typer.echo(f"wrote {path}; edit it, then: tiltlm fit {path}, and tiltlm tune {path}")


@app.command()
def env() -> None:
    """Versions and devices, for a bug report."""
    import platform

    import torch

    from tiltlm.runs.directory import git_commit, installed_versions

    for package, version in installed_versions().items():
        typer.echo(f"{package:<14}{version}")
    typer.echo(f"{'platform':<14}{platform.platform()}")
    typer.echo(f"{'threads':<14}{torch.get_num_threads()}")
    typer.echo(f"{'git commit':<14}{git_commit() or 'none'}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    typer.echo(f"{'devices':<14}{', '.join(['cpu', *devices, *(['mps'] if torch.mps.is_available() else [])])}")


def main() -> None:
    """Run the command line; errors that the user can mend become one message and an exit code."""
    try:
        app(standalone_mode=True)
    except TiltError as error:
        _fail(error, error.exit_code)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output left, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        _fail(error, 1, f"{type(error).__name__}: ")


def _fail(error: Exception, code: int, kind: str = "") -> None:
    if os.environ.get("TILTLM_TRACEBACK"):
        raise error
    typer.echo(f"error: {kind}{str(error).strip()}", err=True)
    if kind:
        typer.echo("This was not foreseen; set TILTLM_TRACEBACK=1 to see where it happened.", err=True)
    sys.exit(code)
