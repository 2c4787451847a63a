"""`tiltlm init`: write a commented config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tiltlm.errors import UsageError


def init(name: Annotated[str, typer.Argument(metavar="[NAME]", help="name of the config to write")] = "tilt") -> None:
    """Write a commented config to start from."""
    from tiltlm.config.starter import starter_config

    path = Path(name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(starter_config())
    except FileExistsError as error:
        raise UsageError(f"{path} exists; choose another NAME or delete it") from error
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error}") from error
    typer.echo(f"wrote {path}; edit it, then: tiltlm fit {path}, and tiltlm tune {path}")
