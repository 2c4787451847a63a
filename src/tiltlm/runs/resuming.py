"""What must be the same for a run to go on, or to be measured again: its configuration and the weights of its base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tiltlm.errors import CheckpointError, UsageError
from tiltlm.runs.directory import RunDirectory

# What may change between two sittings of one run without changing what it computes.
CHANGEABLE = ("output_dir", "report_to", "callbacks", "evaluation", "training.save_steps", "training.logging_steps")


def has_ended(directory: RunDirectory) -> bool:
    """Whether the run reached its end, wherever its tuned model is by now."""
    return bool(directory.read_run()["status"] == "done")


def is_done(directory: RunDirectory) -> bool:
    """Whether the run reached its end and its tuned model is there."""
    return has_ended(directory) and directory.policy_dir.is_dir()


def check_same_config(
    directory: RunDirectory, config: Mapping[str, Any], stated: Mapping[str, Any], *, done: bool
) -> None:
    """Raise UsageError, with every difference, where ``config`` asks for another run than the one in ``directory``.

    ``stated`` is what of it is not at its default: a key that the run's record lacks came with a later tiltlm, and must
    be at its default. Where the run is ``done`` it is not evaluated again, so the evaluation must be the same too.
    """
    changeable = tuple(key for key in CHANGEABLE if not (done and key == "evaluation"))
    then, now = (
        {key: value for key, value in _flat(stated).items() if not key.startswith(changeable)}
        for stated in (directory.read_run()["config"], config)
    )
    known = then.keys() | _flat(stated).keys()
    changed = [
        f"{key} was {then.get(key)!r} and is {now.get(key)!r}"
        for key in then | now
        if key in known and then.get(key) != now.get(key)
    ]
    if changed:
        advice = "; the run is done, `tiltlm eval` takes other measures of it" if done else ""
        raise UsageError(f"--resume: the config is not the one of {directory.path}: {'; '.join(changed)}{advice}")


def check_same_base(directory: RunDirectory, fingerprint: str) -> None:
    """Raise CheckpointError where the weights of the base are not those that the run began with."""
    record = directory.read_run()
    known = record.get("base_fingerprint")
    if known not in (None, fingerprint):
        raise CheckpointError(
            f"{directory.path}: the weights of its base '{record['config']['model']}' have changed since it began "
            f"(fingerprint {known[:12]} then, {fingerprint[:12]} now). Put the old ones back, or start anew in another "
            f"output directory."
        )


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    result: dict[str, Any] = {}
    for key, value in nested.items():
        name = prefix + key
        result.update(_flat(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return result
