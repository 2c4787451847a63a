"""Checks before a run is resumed or measured again: the same config and the same base weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tiltlm.errors import CheckpointError, UsageError
from tiltlm.runs.directory import RunDirectory

# Settings that may change when a run is resumed, because they do not change its results.
CHANGEABLE = ("output_dir", "report_to", "callbacks", "evaluation", "training.save_steps", "training.logging_steps")


def has_ended(directory: RunDirectory) -> bool:
    """Whether the run is done, even if its tuned model was moved."""
    return bool(directory.read_run()["status"] == "done")


def is_done(directory: RunDirectory) -> bool:
    """Whether the run is done and its tuned model exists."""
    return has_ended(directory) and directory.policy_dir.is_dir()


def check_same_config(
    directory: RunDirectory, config: Mapping[str, Any], non_defaults: Mapping[str, Any], *, done: bool
) -> None:
    """Raise UsageError with every difference if ``config`` is not the config of the run in ``directory``.

    ``non_defaults`` are the settings of ``config`` that differ from their defaults. A key that is not in the record of
    the run came with a later tiltlm and must have its default. A run that is ``done`` is not evaluated again, so its
    evaluation section must be the same.
    """
    changeable = tuple(key for key in CHANGEABLE if not (done and key == "evaluation"))
    then, now = (
        {key: value for key, value in _flat(one).items() if not key.startswith(changeable)}
        for one in (directory.read_run()["config"], config)
    )
    known = then.keys() | _flat(non_defaults).keys()
    changed = [
        f"{key} was {then.get(key)!r} and is {now.get(key)!r}"
        for key in then | now
        if key in known and then.get(key) != now.get(key)
    ]
    if changed:
        advice = "; the run is done; `tiltlm eval` measures it with other settings" if done else ""
        raise UsageError(f"--resume: the config is not the one of {directory.path}: {'; '.join(changed)}{advice}")


def check_same_base(directory: RunDirectory, fingerprint: str) -> None:
    """Raise CheckpointError if the base's weights differ from those at the start of the run."""
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
