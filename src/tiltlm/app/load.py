"""Load a finished run: its config, models and target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tiltlm.app.build import build_base, build_own_target, build_terms
from tiltlm.config.run import RunConfig, parse_config
from tiltlm.errors import UsageError
from tiltlm.features import Feature
from tiltlm.lm import LanguageModel, Roles
from tiltlm.runs.directory import RunDirectory
from tiltlm.runs.resuming import check_same_base
from tiltlm.targets import Target, TiltedTarget


def load_policy(directory: RunDirectory, device: str = "auto") -> tuple[RunConfig, LanguageModel]:
    """The config and the tuned model of a finished run, without its target. Raises CheckpointError, UsageError."""
    record = directory.read_run()
    if not directory.policy_dir.is_dir():
        raise UsageError(
            f"{directory.path}: it has no tuned model yet (status: {record['status']}); finish it with --resume"
        )
    config = parse_config({**record["config"], "device": device})
    if config.peft is not None:
        return config, _unchanged_base(directory, config).with_adapter(directory.policy_dir)
    return config, LanguageModel.from_pretrained(directory.policy_dir, device=device, dtype=config.dtype)


def load_run(
    directory: RunDirectory | str | Path, device: str = "auto", features: Sequence[Feature] = ()
) -> tuple[RunConfig, Roles, Target]:
    """The config, both models and the fitted target of a finished run.

    Pass again as ``features`` the objects that a run file cannot name; they are matched by name. Raises UsageError for
    a run that is not finished, CheckpointError for a damaged one or a base that has changed.
    """
    directory = directory if isinstance(directory, RunDirectory) else RunDirectory.open(directory)
    config, policy = load_policy(directory, device)
    base = _unchanged_base(directory, config).freeze() if config.peft is None else None
    roles = Roles(policy, base)
    if config.target.python is not None:
        return config, roles, build_own_target(config)
    fitted = [entry["coefficient"] for entry in directory.read_run()["target"]["features"]]
    terms = [
        replace(term, coefficient=known["value"] if known else 0.0)
        for term, known in zip(build_terms(config, features), fitted, strict=True)
    ]
    return config, roles, TiltedTarget(tuple(terms))


def _unchanged_base(directory: RunDirectory, config: RunConfig) -> LanguageModel:
    base = build_base(config)
    check_same_base(directory, base.fingerprint())
    return base
