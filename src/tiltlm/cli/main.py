"""The command line: its commands, and how their errors become exit codes. Commands import what they need on use."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from tiltlm._version import __version__
from tiltlm.cli.compare import compare
from tiltlm.cli.env import env
from tiltlm.cli.evaluate import evaluate
from tiltlm.cli.fit import fit
from tiltlm.cli.init import init
from tiltlm.cli.report import report
from tiltlm.cli.sample import sample
from tiltlm.cli.tune import tune
from tiltlm.errors import TiltError

app = typer.Typer(
    name="tiltlm",
    help="Tune a language model toward a distribution that you state, and see how close it got.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(tune)
app.command()(fit)
app.command("eval")(evaluate)
app.command()(sample)
app.command()(compare)
app.command()(report)
app.command()(init)
app.command()(env)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tiltlm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and stop")
    ] = False,
) -> None:
    """Tune a language model toward a distribution that you state, and see how close it got."""


def main() -> None:
    """Run the command line; an error becomes one message and an exit code."""
    try:
        app(standalone_mode=True)
    except TiltError as error:
        _fail(error, error.exit_code)
    except KeyboardInterrupt:
        typer.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of the output closed the pipe, as `head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        _fail(error, 1, f"{type(error).__name__}: ")


def _fail(error: Exception, code: int, kind: str = "") -> None:
    if os.environ.get("TILTLM_TRACEBACK"):
        raise error
    typer.echo(f"error: {kind}{str(error).strip()}", err=True)
    if kind:
        typer.echo("This error was not expected; set TILTLM_TRACEBACK=1 to see the traceback.", err=True)
    sys.exit(code)
