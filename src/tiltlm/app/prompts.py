"""The prompts of a run, read once from its config, and as tokens of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tiltlm.config.prompt_data import PromptData, prompt_dataset, prompt_file, stated_prompts
from tiltlm.config.run import PromptsConfig, RunConfig
from tiltlm.lm import LanguageModel, Prompts


@dataclass(frozen=True)
class PromptSplit:
    """The prompts to train on (None: none, a text begins with BOS), and those for evaluation alone, if there are."""

    training: PromptData | None
    held_out: PromptData | None = None


def read_prompts(config: RunConfig) -> PromptSplit:
    """The prompts of a config with their columns. Raises UsageError."""
    stated = config.prompts
    if stated is None:
        return PromptSplit(None)
    if not isinstance(stated, PromptsConfig):
        return PromptSplit(stated_prompts(stated))
    if stated.rows is not None:
        found = stated_prompts(stated.rows, stated.column)
    elif stated.path is not None:
        found = prompt_file(stated.path, stated.column)
    else:
        found = prompt_dataset(str(stated.dataset), stated.column, subset=stated.subset, split=stated.split)
    if stated.samples is not None:
        found = found.select(range(min(stated.samples, len(found))))
    if stated.held_out is None:
        return PromptSplit(found)
    if isinstance(stated.held_out, float):
        return PromptSplit(*found.split(stated.held_out, config.fit_seed))
    return PromptSplit(found, other_prompts(config, stated.held_out))


def other_prompts(config: RunConfig | None, given: str | list[Any]) -> PromptData:
    """Prompts beside those of a config, from the same column: a list, a file, or one prompt. Raises UsageError."""
    stated = config.prompts if config is not None else None
    return stated_prompts(given, stated.column if isinstance(stated, PromptsConfig) else "prompt")


def encode_prompts(model: LanguageModel, data: PromptData | None) -> Prompts:
    """The prompts as tokens of a model, with their columns; one that is just BOS where there are none."""
    return model.encode_prompts(None) if data is None else model.encode_prompts(data.prompts, data.columns)
