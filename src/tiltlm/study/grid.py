"""From a study file to its runs: settings are merged, steps follow from the budget, impossible cells are skipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from tiltlm.app.method import build_method
from tiltlm.app.plan import plan_run
from tiltlm.config.run import RunConfig, parse_config
from tiltlm.config.study import MethodSection, StudyConfig, TaskSection
from tiltlm.errors import MethodTargetError, ModelError, UsageError
from tiltlm.training.proposal_rules import ProposalRule

MERGED_SECTIONS = ("training", "evaluation")
# The placeholder for the task when a method is checked alone, and for the method when a task is.
PLACEHOLDER_TASK = {"model": "embedded", "target": {"constraints": [{"feature": "length", "moment": 1.0}]}}


@dataclass(frozen=True)
class Variant:
    """A method as it is run: ``family`` is its name in the file, shared by the variants of several batch sizes."""

    name: str
    family: str
    label: str
    section: MethodSection
    batch_size: int | None = None


@dataclass(frozen=True)
class PlannedRun:
    """One run of the grid; ``sequences`` is the number that it draws in all."""

    task: str
    method: str
    seed: int
    config: RunConfig
    sequences: int

    @property
    def name(self) -> str:
        """The name in messages, logs and folders."""
        return run_name(self.task, self.method, self.seed)


def run_name(task: str, method: str, seed: int) -> str:
    """The name of a run in messages, logs and folders."""
    return f"{task}/{method}/seed-{seed}"


@dataclass(frozen=True)
class Skipped:
    """A cell of the grid whose method cannot match its target, and the reason."""

    task: str
    method: str
    reason: str


@dataclass(frozen=True)
class Grid:
    """All runs in order (all cells of the first seed first), and the cells that are skipped.

    ``unchecked`` gives the reason for each task whose target was not checked, i.e. the model that is missing.
    """

    study: StudyConfig
    variants: tuple[Variant, ...]
    runs: tuple[PlannedRun, ...]
    skipped: tuple[Skipped, ...]
    unchecked: dict[str, str]

    def of_task(self, task: str) -> list[PlannedRun]:
        """The runs of one task."""
        return [run for run in self.runs if run.task == task]

    def matching(self, patterns: Sequence[str]) -> frozenset[str]:
        """Names of the runs that match any of the shell patterns; without patterns, of all runs.

        Raises UsageError if a pattern matches nothing.
        """
        matching_runs: set[str] = set()
        for pattern in patterns:
            matched = {run.name for run in self.runs if fnmatchcase(run.name, pattern)}
            if not matched:
                example = f", as '{self.runs[0].name}'" if self.runs else ""
                raise UsageError(
                    f"--only '{pattern}': no run of this study matches; they are named TASK/METHOD/seed-N{example}, "
                    f"and * stands for anything"
                )
            matching_runs |= matched
        return frozenset(matching_runs) if patterns else frozenset(run.name for run in self.runs)


def expand(study: StudyConfig, *, strict: bool = True) -> Grid:
    """All runs of a study, each checked as far as possible before any work. Raises UsageError that names the place.

    ModelError for a feature's model that cannot be loaded or, unless ``strict``, a note on its task in ``unchecked``.
    """
    shared = dict(study.shared)
    _checked("shared", {**PLACEHOLDER_TASK, **shared})
    for name, task in study.tasks.items():
        _checked(f"tasks.{name}", _with_task(shared, task))
    variants = tuple(_variants(study))
    for variant in variants:
        _checked(f"methods.{variant.family}", _with_method({**PLACEHOLDER_TASK, **shared}, variant))
    cells: list[tuple[str, Variant, RunConfig, int]] = []
    skipped: list[Skipped] = []
    unchecked: dict[str, str] = {}
    for name, task in study.tasks.items():
        for variant in variants:
            if variant.section.tasks is not None and name not in variant.section.tasks:
                continue
            with _naming_place(f"tasks.{name} with methods.{variant.family}"):
                config = _cell(study, task, variant)
                config, sequences = _with_steps(config, study.budget(name), config.target.samples)
                try:
                    reason = None if name in unchecked else _why_omitted(config)
                except ModelError as error:
                    if strict:
                        raise
                    reason, unchecked[name] = None, str(error)
            if reason is not None:
                skipped.append(Skipped(name, variant.name, reason))
            else:
                cells.append((name, variant, config, sequences))
    runs = tuple(
        PlannedRun(task, variant.name, seed, config.model_copy(update={"seed": seed}), sequences)
        for seed in study.seed_list
        for task, variant, config, sequences in cells
    )
    return Grid(study, variants, runs, tuple(skipped), unchecked)


def _why_omitted(config: RunConfig) -> str | None:
    """The reason why the method cannot match the target; None if it can. Raises UsageError for other mistakes."""
    try:
        plan_run(config)
    except MethodTargetError as error:
        return str(error).removeprefix("method.name: ")
    return None


def steps_within(budget: int, fit: int, batch: int, reuse: bool, rule: ProposalRule) -> tuple[int, int]:
    """The most steps that draw no more than ``budget`` sequences in all, and how many they draw.

    The fit's samples count first. Steps that train on them draw nothing; later ones draw a batch, and a check of the
    proposal its extra batches.
    """
    steps, drawn = 0, fit
    while True:
        reused = reuse and (steps + 1) * batch <= fit
        cost = (0 if reused else batch) + (rule.extra_batches * batch if rule.due(steps + 1) else 0)
        if drawn + cost > budget:
            return steps, drawn
        steps, drawn = steps + 1, drawn + cost


def with_fit(run: PlannedRun, budget: int, fit: int) -> PlannedRun:
    """The same run if the fit of its task drew ``fit`` samples, e.g. more for rare features.

    Raises UsageError if the budget leaves no step.
    """
    if fit == run.config.target.samples:
        return run
    config, sequences = _with_steps(run.config, budget, fit)
    return replace(run, config=config, sequences=sequences)


def _variants(study: StudyConfig) -> Iterator[Variant]:
    for name, section in study.methods.items():
        label = section.label or name
        if section.batch_sizes is None:
            yield Variant(name, name, label, section)
        for size in section.batch_sizes or []:
            yield Variant(f"{name}, batch {size}", name, f"{label}, batch {size}", section, size)


def _with_task(raw: Mapping[str, Any], task: TaskSection) -> dict[str, Any]:
    given = {key: getattr(task, key) for key in ("model", "prompts", "max_completion_length")}
    set_keys = {key: value for key, value in given.items() if value is not None}
    return _merged(raw, {**set_keys, "target": task.target, "training": task.training, "evaluation": task.evaluation})


def _with_method(raw: Mapping[str, Any], variant: Variant) -> dict[str, Any]:
    section = variant.section
    training = dict(section.training)
    if variant.batch_size is not None:
        training["batch_size"] = variant.batch_size
    own: dict[str, Any] = {"method": section.method, "training": training}
    if "peft" in section.model_fields_set:
        own["peft"] = section.peft
    return _merged(raw, own)


def _merged(raw: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of ``more`` replace those of ``raw``; in training and evaluation, each setting by itself."""
    joined = {
        key: {**(raw.get(key) or {}), **(more.get(key) or {})} for key in MERGED_SECTIONS if key in raw or key in more
    }
    return {**raw, **more, **joined}


def _cell(study: StudyConfig, task: TaskSection, variant: Variant) -> RunConfig:
    raw = _with_method(_with_task(study.shared, task), variant)
    return parse_config({**raw, "target": {"seed": study.reference.seed, **task.target}})


def _checked(where: str, raw: Mapping[str, Any]) -> None:
    training = raw.get("training")
    with _naming_place(where):
        if isinstance(training, Mapping) and "max_steps" in training:
            raise UsageError("training.max_steps: it follows from sequences, the budget; leave it out")
        parse_config(raw)


@contextmanager
def _naming_place(where: str) -> Iterator[None]:
    """Prefix errors raised in the block with the place in the study file."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"study: {where}: {str(error).removeprefix('config: ')}") from error


def _with_steps(config: RunConfig, budget: int, fit: int) -> tuple[RunConfig, int]:
    rule = build_method(config.method).rule
    training = config.training
    steps, drawn = steps_within(budget, fit, training.batch_size, training.reuse_fit_samples, rule)
    if steps < 1:
        raise UsageError(
            f"a budget of {budget:,} sequences leaves no step of {training.batch_size} after the {fit:,} of the fit; "
            f"raise sequences, or lower target.samples"
        )
    # Parsing the whole config checks it again.
    record = config.to_json()
    return parse_config({**record, "training": {**record["training"], "max_steps": steps}}), drawn
