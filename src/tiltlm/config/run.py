"""The run file: every key, its type, its default and what it means. Knows no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from tiltlm.config.training import TrainingArguments
from tiltlm.errors import UsageError, nearest

FeatureSpec = str | dict[str, Any]


class Section(BaseModel):
    """A mapping of the run file; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ConstraintConfig(Section):
    """One feature and the mean that it is to have."""

    feature: Annotated[FeatureSpec, Field(description="what is measured, e.g. {wordlist: sports}")]
    moment: Annotated[float, Field(allow_inf_nan=False, description="its mean; 1.0 of a binary feature is a filter")]
    name: Annotated[str | None, Field(description="how reports call it")] = None


class RewardConfig(Section):
    """A reward r that multiplies the base by exp(r/beta)."""

    feature: Annotated[FeatureSpec, Field(description="what is rewarded, e.g. {sentiment: compound}")]
    beta: Annotated[float, Field(gt=0, allow_inf_nan=False, description="the smaller, the stronger")] = 1.0
    name: Annotated[str | None, Field(description="how reports call it")] = None


class TargetConfig(Section):
    """The distribution that is wanted."""

    constraints: Annotated[list[ConstraintConfig], Field(description="features and their moments")] = []
    reward: Annotated[RewardConfig | None, Field(description="an optional reward beside them")] = None
    python: Annotated[
        str | None, Field(description="package.module:name of a target of your own, in place of the above")
    ] = None
    args: Annotated[dict[str, Any], Field(description="arguments of that target")] = {}
    samples: Annotated[int, Field(ge=2, description="samples of the base that the target is fitted on")] = 4096
    seed: Annotated[int | None, Field(ge=0, description="seed of these samples; null: that of the run")] = None

    @model_validator(mode="after")
    def _one_kind(self) -> TargetConfig:
        stated = bool(self.constraints) or self.reward is not None
        if stated == (self.python is not None):
            raise ValueError("give constraints or a reward, or else python: package.module:name, not both")
        return self


class MethodConfig(Section):
    """The objective and its proposal rule."""

    name: Annotated[str, Field(description="one of docs/methods.md, or package.module:name of your own")] = "kept_guide"
    proposal: Annotated[
        str | None, Field(description="on_policy, interval, kl, tv, published or guided; null: the method's own")
    ] = None
    check_steps: Annotated[int, Field(ge=1, description="steps between two questions whether q becomes π")] = 10
    args: Annotated[dict[str, Any], Field(description="arguments of the method")] = {}


class EvaluationConfig(Section):
    """The fresh samples that a run ends with."""

    samples: Annotated[int, Field(ge=2, description="samples of the policy, with full sampling")] = 2048
    top_p: Annotated[float | None, Field(gt=0, le=1, description="moments also under top-p sampling; null: not")] = 0.9
    texts: Annotated[int, Field(ge=1, description="texts of base and policy that are kept for reading")] = 200


class PromptsConfig(Section):
    """Where prompts come from, with the columns beside them, and which of them are for evaluation alone."""

    rows: Annotated[list[Any] | None, Field(description="the prompts themselves")] = None
    path: Annotated[str | None, Field(description="or a file: .txt, .jsonl, .json, .csv or .parquet")] = None
    dataset: Annotated[str | None, Field(description="or a data set, by its name on the hub or its folder")] = None
    subset: Annotated[str | None, Field(description="of a data set that has several")] = None
    split: Annotated[str, Field(description="of a data set")] = "train"
    column: Annotated[str, Field(description="the one that holds the prompt: text, or chat messages")] = "prompt"
    samples: Annotated[int | None, Field(ge=1, description="only the first so many; null: all")] = None
    held_out: Annotated[
        float | str | list[Any] | None,
        Field(description="never trained on: a share of the prompts, or a file or list of others"),
    ] = None

    @model_validator(mode="after")
    def _one_source(self) -> PromptsConfig:
        if sum(source is not None for source in (self.rows, self.path, self.dataset)) != 1:
            raise ValueError("give path, a file, or else dataset, a name on the hub or a folder, or else rows")
        if isinstance(self.held_out, float) and not 0 < self.held_out < 1:
            raise ValueError(f"held_out: {self.held_out:g} must be a share between 0 and 1, a file or a list")
        return self


def _kind_of_prompts(stated: Any) -> str | None:
    if isinstance(stated, Mapping | PromptsConfig):
        return "mapping"
    return "text" if isinstance(stated, str) else "list" if isinstance(stated, list) else None


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
        Field(description="of the weights: float32, float64, bfloat16, float16; auto: float32, but bfloat16 products"),
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

    def stated(self) -> dict[str, Any]:
        """Every key that is not at its default, and every key of ``model`` and ``target``."""
        usual = RunConfig(model=self.model, target=self.target).to_json()
        return _beyond(self.to_json(), {**usual, "model": None, "target": None})


def _beyond(stated: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """What of a nested mapping is not as usual."""
    found = {}
    for key, value in stated.items():
        if isinstance(value, Mapping) and isinstance(usual.get(key), Mapping):
            value = _beyond(value, usual[key])
            if value:
                found[key] = value
        elif key not in usual or value != usual[key]:
            found[key] = value
    return found


class _Loader(yaml.SafeLoader):
    """YAML's plain data; 1e-4 is a number, as in YAML 1.2, and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for i, key in enumerate(keys):
            if key.value in [earlier.value for earlier in keys[:i]]:
                problem = f"the key '{key.value}' stands there twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read_yaml(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong and where, in one line."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem is None or mark is None:
        return " ".join(str(error).split())
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1})"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML run file and apply ``key=value`` overrides (dotted keys). Raises UsageError."""
    raw = read_mapping(Path(path), "config", "`model: embedded`", "`tiltlm init` writes one to start from")
    for override in overrides:
        apply_override(raw, override)
    return parse_config(raw)


def read_mapping(path: Path, what: str, example: str, advice: str) -> dict[str, Any]:
    """The keys and values of a YAML file that is to be ``what``, such as ``example``. Raises UsageError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{what}: {path} cannot be read ({error}); {advice}") from error
    try:
        raw = _read_yaml(text)
    except yaml.YAMLError as error:
        raise UsageError(f"{what}: {path} is not valid YAML: {_yaml_problem(error)}") from error
    if not isinstance(raw, dict):
        raise UsageError(f"{what}: {path} must hold keys and values, such as {example}; it holds {raw!r:.60}")
    return raw


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one dotted ``key=value`` in a raw config; the value is read as YAML. Raises UsageError."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UsageError(f"'{override}': an override reads key=value, e.g. training.max_steps=100")
    try:
        parsed = _read_yaml(value)
    except yaml.YAMLError as error:
        raise UsageError(f"'{override}': the value is not valid YAML: {_yaml_problem(error)}") from error
    *parents, last = key.split(".")
    place: Any = raw
    for part in parents:
        if isinstance(place, list):
            place = place[_index(place, part, override)]
            continue
        inner = place.get(part)
        if isinstance(inner, str) and part == "method":
            inner = {"name": inner}
        if isinstance(inner, str) and part == "prompts":
            inner = {"path": inner}
        if not isinstance(inner, dict | list):
            inner = {}
        place[part] = inner
        place = inner
    if isinstance(place, list):
        place[_index(place, last, override)] = parsed
    elif last == "feature" or not isinstance(place.get(last), dict) or isinstance(parsed, dict) or parsed is None:
        place[last] = parsed
    elif last == "method":
        place[last] = {**place[last], "name": parsed}
    else:
        raise UsageError(f"'{override}': {key} holds keys of its own ({', '.join(place[last])}); name one of them")


def _index(items: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        raise UsageError(f"'{override}': '{part}' is no place in a list of {len(items)}; count from 0")
    return int(part)


def parse_config(raw: Mapping[str, Any]) -> RunConfig:
    """Validate a raw config. Raises UsageError that names each wrong key, its value and the nearest valid one."""
    try:
        config = RunConfig.model_validate(dict(raw))
    except ValidationError as error:
        raise UsageError(f"config: {explained(error, _valid_keys)}") from error
    reject_switches(raw, config)
    return config


def explained(error: ValidationError, valid_keys: Callable[[Sequence[str]], list[str]]) -> str:
    """What pydantic refused, field by field; ``valid_keys`` are those at a place of the file."""
    problems: dict[str, list[Any]] = {}
    for problem in error.errors():
        location = ".".join(str(part) for part in problem["loc"] if not _is_union_tag(str(part)))
        problems.setdefault(location, []).append(problem)
    return "; ".join(_explain(field, found, valid_keys) for field, found in problems.items())


def _explain(field: str, problems: Sequence[Any], valid_keys: Callable[[Sequence[str]], list[str]]) -> str:
    """One sentence for what pydantic says of one field: several things where it may be of several types."""
    *parents, key = field.split(".")
    kind, value = problems[0]["type"], problems[0]["input"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument", "invalid_key"):
        return f"unknown key '{field}'; {nearest(key, valid_keys(parents))}"
    if kind == "missing":
        return f"'{field}' is missing; it has no default"
    if kind == "value_error":
        return f"{field or 'the file'}: {problems[0]['msg'].removeprefix('Value error, ')}"
    wanted = " or ".join(dict.fromkeys(_wanted(problem) for problem in problems))
    shown = repr(value)
    return f"{field}: must be {wanted} (it is {shown if len(shown) <= 80 else shown[:79] + '…'})"


def _wanted(problem: Any) -> str:
    if problem["type"] in ("model_type", "model_attributes_type", "dataclass_type", "dict_type"):
        return "a mapping of keys and values"
    return str(problem["msg"]).removeprefix("Input should be ")


def _is_union_tag(part: str) -> bool:
    return "[" in part or part in ("str", "text", "list", "mapping")


def reject_switches(raw: Any, parsed: Any, field: str = "", what: str = "config") -> None:
    """Refuse true and false for a number: pydantic takes them for 1 and 0, and a moment of 1 is a filter."""
    if isinstance(raw, Mapping):
        for key, value in raw.items():
            inner = parsed.get(key) if isinstance(parsed, Mapping) else getattr(parsed, str(key), None)
            reject_switches(value, inner, f"{field}.{key}" if field else str(key), what)
    elif isinstance(raw, list) and isinstance(parsed, list):
        for i, (value, inner) in enumerate(zip(raw, parsed, strict=True)):
            reject_switches(value, inner, f"{field}.{i}", what)
    elif isinstance(raw, bool) and isinstance(parsed, int | float) and not isinstance(parsed, bool):
        raise UsageError(f"{what}: {field}: must be a number (it is {raw})")


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
    return list(getattr(section, "model_fields", None) or section.__pydantic_fields__)
