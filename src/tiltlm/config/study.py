"""The study file: every key, its type, its default and what it means. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from tiltlm.config.run import RunConfig, Section
from tiltlm.config.validation import validated
from tiltlm.config.yaml_file import read_mapping
from tiltlm.errors import UsageError, nearest

# Keys of a run file that a study sets itself.
SET_BY_STUDY = ("target", "seed", "output_dir")
FORBIDDEN_IN_NAMES = '/\\:*?"<>|'


class TaskSection(Section):
    """One task: a target, and run settings of its own."""

    target: Annotated[dict[str, Any], Field(description="the target section of a run file")]
    label: Annotated[str | None, Field(description="its name in tables and figures; null: its key")] = None
    sequences: Annotated[int | None, Field(ge=1, description="its budget; null: that of the study")] = None
    model: Annotated[str | None, Field(description="its base; null: the shared one")] = None
    prompts: Annotated[Any, Field(description="as in a run file; null: the shared ones")] = None
    max_completion_length: Annotated[int | None, Field(ge=1, description="in tokens; null: the shared one")] = None
    training: Annotated[dict[str, Any], Field(default_factory=dict, description="training settings for this task")]
    evaluation: Annotated[dict[str, Any], Field(default_factory=dict, description="evaluation settings for this task")]


class MethodSection(Section):
    """One method, and run settings of its own, which replace those of the task."""

    method: Annotated[str | dict[str, Any], Field(description="the method section of a run file, or its name")]
    label: Annotated[str | None, Field(description="its name in tables and figures; null: its key")] = None
    training: Annotated[dict[str, Any], Field(default_factory=dict, description="training settings for this method")]
    peft: Annotated[
        dict[str, Any] | None, Field(description="LoRA settings; null: full tuning; left out: the shared ones")
    ] = None
    tasks: Annotated[list[str] | None, Field(description="only these tasks; null: all that it can match")] = None
    batch_sizes: Annotated[
        list[Annotated[int, Field(ge=1)]] | None, Field(description="a variant for each, with the same budget")
    ] = None


class ReferenceSection(Section):
    """The frozen sample of p, one per task, on which KL(p‖π) of all its runs is measured."""

    samples: Annotated[int, Field(ge=2, description="sequences drawn for it, outside of any budget")] = 16384
    scored: Annotated[int, Field(ge=2, description="the number of these that each tuned model scores")] = 4096
    proposal: Annotated[
        str | None,
        Field(
            description="base, or guided (half and half); null: base or, if its ESS is low, the one with the larger ESS"
        ),
    ] = None
    seed: Annotated[int, Field(ge=0, description="seed of this sample, and of the fit of each task")] = 0

    @field_validator("proposal")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value not in (None, "base", "guided"):
            raise ValueError(f"reference.proposal: '{value}' is not known; {nearest(value, ('base', 'guided'))}")
        return value


class CurveSection(Section):
    """Measurements during a run, on samples that are not trained on and count in no budget."""

    points: Annotated[int, Field(ge=0, description="measurements, evenly over the steps; 0: none")] = 6
    samples: Annotated[int, Field(ge=2, description="samples of the policy at each")] = 512
    reference: Annotated[int, Field(ge=2, description="samples of the frozen reference at each")] = 1024


class StudyConfig(Section):
    """A whole study: tasks × methods × seeds."""

    title: Annotated[str | None, Field(description="title of the results; null: the name of the file")] = None
    sequences: Annotated[
        int, Field(ge=1, description="the budget of a run: every sequence that it draws, its fit included")
    ]
    seeds: Annotated[
        Annotated[int, Field(ge=1)] | list[Annotated[int, Field(ge=0)]],
        Field(description="the number of seeds (0, 1, …), or a list"),
    ] = 3
    tasks: Annotated[dict[str, TaskSection], Field(min_length=1, description="by name")]
    methods: Annotated[dict[str, MethodSection], Field(min_length=1, description="by name")]
    shared: Annotated[dict[str, Any], Field(default_factory=dict, description="any keys of a run file, for all runs")]
    reference: ReferenceSection = ReferenceSection()
    curve: CurveSection = CurveSection()
    output_dir: Annotated[str | None, Field(description="null: runs/NAME, from the name of this file")] = None

    @property
    def seed_list(self) -> list[int]:
        """The seeds of each pair of task and method."""
        return list(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    def budget(self, task: str) -> int:
        """The sequences that a run of this task may draw."""
        return self.tasks[task].sequences or self.sequences

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        seeds = self.seed_list
        if not seeds or len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds: give at least one, and none twice (they are {seeds})")
        for kind, names in (("tasks", list(self.tasks)), ("methods", list(self.methods))):
            _check_names(kind, names)
        for name, method in self.methods.items():
            for task in method.tasks or []:
                if task not in self.tasks:
                    raise ValueError(f"methods.{name}.tasks: there is no task '{task}'; {nearest(task, self.tasks)}")
            sizes = method.batch_sizes
            if sizes is not None and (not sizes or len(set(sizes)) < len(sizes)):
                raise ValueError(f"methods.{name}.batch_sizes: give at least one, and none twice (they are {sizes})")
        return self


def _check_names(kind: str, names: Sequence[str]) -> None:
    """Check names that become folders, also on disks that ignore case."""
    folded = [name.casefold() for name in names]
    for name in names:
        bad = [c for c in name if c in FORBIDDEN_IN_NAMES or not c.isprintable()]
        if bad or not name or name != name.strip(" .") or len(name) > 80:
            raise ValueError(
                f"{kind}.{name}: the name becomes a folder: use 1 to 80 characters, no dot or space at its ends, "
                f"and none of {FORBIDDEN_IN_NAMES}; a label may be any text"
            )
        if folded.count(name.casefold()) > 1:
            raise ValueError(f"{kind}.{name}: another name differs from it in case only; rename one")


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a YAML study file and apply ``key=value`` overrides (dotted keys). Raises UsageError."""
    example, advice = "`tasks: …` and `methods: …`", "docs/compare.md shows how to write one"
    return parse_study(read_mapping(Path(path), overrides, "study", example, advice))


def parse_study(raw: Mapping[str, Any]) -> StudyConfig:
    """Validate a raw study file; ``grid.expand`` validates the configs of its runs. Raises UsageError."""
    study = validated(StudyConfig, raw, "study", _valid_keys)
    for key in study.shared:
        if key in SET_BY_STUDY:
            raise UsageError(f"study: shared.{key}: {_where_to_set(key)}")
        if key not in RunConfig.model_fields:
            valid = [name for name in RunConfig.model_fields if name not in SET_BY_STUDY]
            raise UsageError(f"study: unknown key 'shared.{key}'; {nearest(str(key), valid)}")
    return study


def _where_to_set(key: str) -> str:
    places = {"target": "each task has its own, under tasks", "seed": "give seeds, beside tasks and methods"}
    return places.get(key, "give output_dir, beside tasks and methods")


def _valid_keys(location: Sequence[str]) -> list[str]:
    """The keys that are valid at this place of the study file."""
    sections: dict[str, Any] = {
        "tasks": TaskSection,
        "methods": MethodSection,
        "reference": ReferenceSection,
        "curve": CurveSection,
    }
    section: Any = sections.get(location[0], StudyConfig) if location else StudyConfig
    return list(section.model_fields)
