"""The run file: every key, its type, its default and what it means. Knows no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from tiltlm.config.training import TrainingArguments
from tiltlm.config.validation import validated
from tiltlm.config.yaml_file import read_mapping

FeatureSpec = str | dict[str, Any]


class Section(BaseModel):
    """A mapping of the run file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ConstraintConfig(Section):
    """One feature and its wanted mean."""

    feature: Annotated[FeatureSpec, Field(description="the measured feature, e.g. {wordlist: sports}")]
    moment: Annotated[float, Field(allow_inf_nan=False, description="its mean; 1.0 of a binary feature is a filter")]
    name: Annotated[str | None, Field(description="its name in reports")] = None


class RewardConfig(Section):
    """A reward r that multiplies the base by exp(r/beta)."""

    feature: Annotated[FeatureSpec, Field(description="the reward, e.g. {sentiment: compound}")]
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False, description="a smaller beta gives a stronger tilt")] = 1.0
    name: Annotated[str | None, Field(description="its name in reports")] = None


class TargetConfig(Section):
    """The wanted distribution."""

    constraints: Annotated[list[ConstraintConfig], Field(description="features and their moments")] = []
    reward: Annotated[RewardConfig | None, Field(description="an optional reward")] = None
    python: Annotated[str | None, Field(description="package.module:name of your own target, instead of the above")] = (
        None
    )
    args: Annotated[dict[str, Any], Field(description="arguments of that target")] = {}
    samples: Annotated[int, Field(ge=2, description="samples of the base that the target is fitted on")] = 4096
    seed: Annotated[int | None, Field(ge=0, description="seed of these samples; null: that of the run")] = None

    @model_validator(mode="after")
    def _one_kind(self) -> TargetConfig:
        named = bool(self.constraints) or self.reward is not None
        if named == (self.python is not None):
            raise ValueError("give constraints or a reward, or else python: package.module:name, not both")
        return self


class MethodConfig(Section):
    """The objective and its proposal rule."""

    name: Annotated[str, Field(description="one of docs/methods.md, or package.module:name of your own")] = "kept_guide"
    proposal: Annotated[
        str | None, Field(description="on_policy, interval, kl, tv, published or guided; null: the method's own")
    ] = None
    check_steps: Annotated[
        int, Field(ge=1, description="steps between checks that may make the policy the proposal")
    ] = 10
    args: Annotated[dict[str, Any], Field(description="arguments of the method")] = {}


class EvaluationConfig(Section):
    """The evaluation at the end of a run, on fresh samples."""

    samples: Annotated[int, Field(ge=2, description="samples of the policy, with full sampling")] = 2048
    top_p: Annotated[
        float | None, Field(gt=0, le=1, description="also measure moments under top-p sampling; null: no")
    ] = 0.9
    texts: Annotated[int, Field(ge=1, description="texts of base and policy to keep")] = 200


class PromptsConfig(Section):
    """Where prompts and their columns come from, and which prompts are for evaluation alone."""

    rows: Annotated[list[Any] | None, Field(description="the prompts themselves")] = None
    path: Annotated[str | None, Field(description="or a file: .txt, .jsonl, .json, .csv or .parquet")] = None
    dataset: Annotated[str | None, Field(description="or a data set, by its name on the hub or its folder")] = None
    subset: Annotated[str | None, Field(description="configuration of a data set")] = None
    split: Annotated[str, Field(description="split of a data set")] = "train"
    column: Annotated[str, Field(description="the column of the prompt: text, or chat messages")] = "prompt"
    samples: Annotated[int | None, Field(ge=1, description="the number of rows to use, from the first; null: all")] = (
        None
    )
    held_out: Annotated[
        float | str | list[Any] | None,
        Field(description="prompts for evaluation alone: a share of the prompts, or a file or list of others"),
    ] = None

    @model_validator(mode="after")
    def _one_source(self) -> PromptsConfig:
        if sum(source is not None for source in (self.rows, self.path, self.dataset)) != 1:
            raise ValueError("give one of path (a file), dataset (a name on the hub, or a folder) and rows")
        if isinstance(self.held_out, float) and not 0 < self.held_out < 1:
            raise ValueError(f"held_out: {self.held_out:g} must be a share between 0 and 1, a file or a list")
        return self


def _kind_of_prompts(value: Any) -> str | None:
    if isinstance(value, Mapping | PromptsConfig):
        return "mapping"
    return "text" if isinstance(value, str) else "list" if isinstance(value, list) else None


PromptsField = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[Any], Tag("list")] | Annotated[PromptsConfig, Tag("mapping")],
    Discriminator(
        _kind_of_prompts,
        custom_error_type="prompts",
        custom_error_message="Input should be a string, a list, or a mapping with path or dataset",
    ),
]


class RunConfig(Section):
    """A whole run; every key but ``model`` and ``target`` has a default."""

    model: Annotated[str, Field(min_length=1, description="embedded, a local folder, or a hub name")]
    target: TargetConfig
    prompts: Annotated[
        PromptsField | None,
        Field(description="one string, a list, a file, or {path or dataset, column, split}: docs/conditional.md"),
    ] = None
    method: MethodConfig = MethodConfig()
    training: TrainingArguments = TrainingArguments()
    peft: Annotated[dict[str, Any] | None, Field(description="settings of peft.LoraConfig; null: full tuning")] = None
    max_completion_length: Annotated[int, Field(ge=1, description="longest completion, in tokens")] = 40
    evaluation: EvaluationConfig = EvaluationConfig()
    callbacks: Annotated[list[str], Field(description="package.module:name of callbacks of your own")] = []
    seed: Annotated[int, Field(ge=0, description="the same seed gives the same run on the same machine")] = 0
    report_to: Annotated[list[str], Field(description="trackers of accelerate, e.g. tensorboard, wandb")] = []
    output_dir: Annotated[str | None, Field(description="null: runs/NAME, from the name of this file")] = None
    device: Annotated[str, Field(description="auto, cpu, cuda, cuda:1, mps")] = "auto"
    dtype: Annotated[
        str,
        Field(description="of the weights: float32, float64, bfloat16, float16; auto: float32, multiplied in bfloat16"),
    ] = "float32"
    trust_remote_code: Annotated[bool, Field(description="run Python code that comes with a hub model")] = False
    revision: Annotated[str | None, Field(description="revision of a hub model")] = None

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("report_to", "callbacks", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [] if value in (None, "none") else [value] if isinstance(value, str) else value

    @property
    def fit_seed(self) -> int:
        """The seed of the samples that the target is fitted on."""
        return self.seed if self.target.seed is None else self.target.seed

    def to_json(self) -> dict[str, Any]:
        """Every key, defaults included: the ``config`` of ``run.json``."""
        return {**self.model_dump(mode="json"), "training": asdict(self.training)}

    def non_defaults(self) -> dict[str, Any]:
        """The keys that differ from their defaults, and every key of ``model`` and ``target``."""
        default = RunConfig(model=self.model, target=self.target).to_json()
        return _difference(self.to_json(), {**default, "model": None, "target": None})


def _difference(given: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a nested mapping whose values differ from ``default``."""
    found = {}
    for key, value in given.items():
        if isinstance(value, Mapping) and isinstance(default.get(key), Mapping):
            value = _difference(value, default[key])
            if value:
                found[key] = value
        elif key not in default or value != default[key]:
            found[key] = value
    return found


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML run file and apply ``key=value`` overrides (dotted keys). Raises UsageError."""
    example, advice = "`model: embedded`", "`tiltlm init` writes one to start from"
    return parse_config(read_mapping(Path(path), overrides, "config", example, advice))


def parse_config(raw: Mapping[str, Any]) -> RunConfig:
    """Validate a raw config. Raises UsageError that names each wrong key, its value and the nearest valid one."""
    return validated(RunConfig, raw, "config", _valid_keys)


def _valid_keys(location: Sequence[str]) -> list[str]:
    """The keys that are valid at this place of the run file."""
    section: Any = RunConfig
    for part in location:
        if part.isdigit():
            continue
        section = {
            "target": TargetConfig,
            "constraints": ConstraintConfig,
            "reward": RewardConfig,
            "method": MethodConfig,
            "training": TrainingArguments,
            "evaluation": EvaluationConfig,
            "prompts": PromptsConfig,
        }[part]
    return list(section.__pydantic_fields__)
