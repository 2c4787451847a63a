"""The commented config that ``tiltlm init`` writes; comments and defaults are the config's own."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

import yaml
from pydantic_core import PydanticUndefined

from tiltlm.config.run import EvaluationConfig, MethodConfig, RunConfig
from tiltlm.config.training import TrainingArguments

HEAD = """\
# A run of tiltlm.   See what the target asks:   tiltlm fit THIS_FILE
#                    Tune toward it:             tiltlm tune THIS_FILE
# A key that is commented out shows its default.

model: embedded  # or a local folder, or a hub name

target:
  constraints:  # features and the mean that each is to have; 1.0 of a yes/no feature keeps only such texts
    - {feature: {pronouns: female}, moment: 0.5}
    # - {feature: {wordlist: sports}, moment: 1.0}
    # - {feature: {contains: "amazing"}, moment: 0.1}
    # - {feature: {python: "my_rewards:brevity", args: {words: 20}}, moment: 0.3, name: brief}
  # reward: {feature: {sentiment: compound}, beta: 0.1}  # multiplies the base by exp(reward / beta)
  # samples: 4096  # samples of the base that the target is fitted on
  # seed: null  # seed of these samples; null: that of the run
"""

SECTIONS = {"method": MethodConfig, "training": TrainingArguments, "evaluation": EvaluationConfig}


def starter_config() -> str:
    """The text of a config that runs as it is, with every key, its default and what it means."""
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
    return next(str(part.description) for part in hint.__metadata__ if getattr(part, "description", None))


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True).strip()
    return text.removesuffix("...").strip()
