"""The commented config that ``tiltlm init`` writes, made from the descriptions and defaults of the config."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from tiltlm.config.run import EvaluationConfig, MethodConfig, RunConfig
from tiltlm.config.training import TrainingArguments

HEAD = """\
# A run file of tiltlm.   Fit the target alone:       tiltlm fit THIS_FILE
#                         Tune the model toward it:   tiltlm tune THIS_FILE
# Keys that are commented out show their defaults.

model: embedded  # or a local folder, or a hub name

target:
  constraints:  # features and their wanted means; 1.0 of a yes/no feature is a filter
    - {feature: {pronouns: female}, moment: 0.5}
    # - {feature: {wordlist: sports}, moment: 1.0}
    # - {feature: {contains: "amazing"}, moment: 0.1}
    # - {feature: {python: "my_rewards:brevity", args: {words: 20}}, moment: 0.3, name: brief}
  # reward: {feature: {sentiment: compound}, beta: 0.1}  # multiplies the base by exp(reward / beta)
  # samples: 4096  # samples of the base for the fit
  # seed: null  # seed of these samples; null: that of the run
"""

SECTIONS = {"method": MethodConfig, "training": TrainingArguments, "evaluation": EvaluationConfig}


def starter_config() -> str:
    """The text of a config that runs as it is, with every key, its default and its description."""
    lines = [HEAD]
    for name, field in RunConfig.model_fields.items():
        if name in ("model", "target"):
            continue
        if name in SECTIONS:
            lines.append(f"# {name}:")
            lines += [f"#   {line}" for line in _described(SECTIONS[name])]
        else:
            lines.append(f"# {name}: {_yaml(field.get_default(call_default_factory=True))}  # {field.description}")
    return "\n".join(lines) + "\n"


def _described(section: type[Any]) -> list[str]:
    if dataclasses.is_dataclass(section):
        hints = get_type_hints(section, include_extras=True)
        defaults = section()
        return [
            f"{f.name}: {_yaml(getattr(defaults, f.name))}  # {_description(hints[f.name])}"
            for f in dataclasses.fields(section)
        ]
    fields = section.model_fields
    assert all(field.default is not PydanticUndefined for field in fields.values())
    return [f"{name}: {_yaml(field.default)}  # {field.description}" for name, field in fields.items()]


def _description(hint: Any) -> str:
    return next(str(part.description) for part in hint.__metadata__ if isinstance(part, FieldInfo))


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True).strip()
    return text.removesuffix("...").strip()
