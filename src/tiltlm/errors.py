"""The errors that tiltlm raises: one root class; each subclass is also the matching standard error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


class TiltError(Exception):
    """An error that the user can fix; the message says how.

    ``exit_code`` is that of the command line: 2 if the command or the configuration is wrong as written, 1 if the work
    failed.
    """

    exit_code = 1


class UsageError(TiltError, ValueError):
    """A wrong setting or argument: an unknown key, a wrong type, a missing file."""

    exit_code = 2


class MethodTargetError(UsageError):
    """A target that the method cannot match, e.g. one with a filter under a loss that is infinite where P = 0."""


class ModelError(TiltError, OSError):
    """A model or tokenizer that cannot be found or loaded."""

    exit_code = 2


class RunExistsError(TiltError, FileExistsError):
    """An output directory whose content would be overwritten."""

    exit_code = 2


class FeatureError(TiltError, ValueError):
    """A feature that raised, or returned something that is not one finite number per text."""


class UnreachableTargetError(TiltError, ValueError):
    """Moments that no reweighting of the base's samples can reach."""


class CheckpointError(TiltError, OSError):
    """A checkpoint or run directory that cannot be read."""


class NumericalError(TiltError, ArithmeticError):
    """A NaN or an infinity with which training cannot continue."""


def why_not_loaded(source: str, error: Exception) -> tuple[str, str]:
    """Where a model was looked for, and the first line of the error that the loading library raised."""
    where = "in this folder" if Path(source).exists() else "as a folder here or a name on the hub"
    return where, str(error).strip().splitlines()[0].rstrip(" .:") if str(error).strip() else type(error).__name__


def nearest(name: str, valid: Iterable[str]) -> str:
    """The closest valid name, if there is one, then all valid names, as the end of a sentence."""
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}valid: {', '.join(valid)}"
