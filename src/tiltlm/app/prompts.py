"""The prompts of a run: read from its config, encoded for a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tiltlm.config.prompt_data import PromptData, parse_prompts, prompt_dataset, prompt_file
from tiltlm.config.run import PromptsConfig, RunConfig
from tiltlm.lm import LanguageModel, Prompts


@dataclass(frozen=True)
class PromptSplit:
    """The prompts for training (None: samples start at BOS) and the held-out prompts for evaluation, if any."""

    training: PromptData | None
    held_out: PromptData | None = None


def read_prompts(config: RunConfig) -> PromptSplit:
    """The prompts of a config, with their columns. Raises UsageError."""
    section = config.prompts
    if section is None:
        return PromptSplit(None)
    if not isinstance(section, PromptsConfig):
        return PromptSplit(parse_prompts(section))
    if section.rows is not None:
        found = parse_prompts(section.rows, section.column)
    elif section.path is not None:
        found = prompt_file(section.path, section.column)
    else:
        found = prompt_dataset(str(section.dataset), section.column, subset=section.subset, split=section.split)
    if section.samples is not None:
        found = found.select(range(min(section.samples, len(found))))
    if section.held_out is None:
        return PromptSplit(found)
    if isinstance(section.held_out, float):
        return PromptSplit(*found.split(section.held_out, config.fit_seed))
    return PromptSplit(found, other_prompts(config, section.held_out))


def other_prompts(config: RunConfig | None, given: str | list[Any]) -> PromptData:
    """Prompts in place of those of a config: a list, a file with the same column, or one prompt. Raises UsageError."""
    section = config.prompts if config is not None else None
    return parse_prompts(given, section.column if isinstance(section, PromptsConfig) else "prompt")


def encode_prompts(model: LanguageModel, data: PromptData | None) -> Prompts:
    """The prompts as tokens of a model, with their columns; None gives BOS alone."""
    return model.encode_prompts(None) if data is None else model.encode_prompts(data.prompts, data.columns)
