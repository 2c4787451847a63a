"""A target and prompts that were made in Python, written as sections of a run file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tiltlm.config.run import ConstraintConfig, RewardConfig, TargetConfig
from tiltlm.features import run_file_form
from tiltlm.features.registry import OBJECT
from tiltlm.lm import Prompts
from tiltlm.targets import FittedTarget


def target_section(target: FittedTarget) -> TargetConfig:
    """The ``target`` section; a feature that no run file can name is recorded by its own name."""
    forms = [(run_file_form(term.feature) or {OBJECT: term.feature.name}, term) for term in target.terms]
    rewards = [RewardConfig(feature=f, beta=1 / term.coefficient) for f, term in forms if term.kind == "reward"]
    return TargetConfig(
        constraints=[
            ConstraintConfig(feature=f, moment=term.goal or 0.0) for f, term in forms if term.kind != "reward"
        ],
        reward=rewards[0] if rewards else None,
        samples=len(target.base_sample.samples),
    )


def prompts_section(prompts: Prompts, held_out: Sequence[Any] | None) -> list[Any] | dict[str, Any] | None:
    """The ``prompts`` section, in the original order of the prompts; None without prompts."""
    if held_out is not None:
        return {"rows": _rows(prompts), "held_out": list(held_out)}
    return _rows(prompts) if any(prompts.texts) or prompts.columns else None


def _rows(prompts: Prompts) -> list[Any]:
    chats = prompts.messages or [None] * len(prompts)
    given = [list(chat) if chat else text or "" for chat, text in zip(chats, prompts.texts, strict=True)]
    columns = [dict(zip(prompts.columns, row, strict=True)) for row in zip(*prompts.columns.values(), strict=True)]
    rows = [{**row, "prompt": prompt} for prompt, row in zip(given, columns, strict=True)] if columns else given
    return [rows[place] for place in sorted(range(len(rows)), key=prompts.ids.__getitem__)]
