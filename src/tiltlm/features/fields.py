"""The input of a feature: the completion, or the prompt with the completion."""

from __future__ import annotations

from typing import Any

from tiltlm.errors import UsageError, nearest
from tiltlm.features.batch import Batch

READS = ("completion", "text")


def check_reads(feature: str, reads: Any, valid: tuple[str, ...] = READS) -> str:
    """The value of the run-file field ``reads``. Raises UsageError if it is not one of ``valid``."""
    if reads not in valid:
        raise UsageError(f"{feature}.reads: {reads!r} is not known; {nearest(str(reads), valid)}")
    return str(reads)


def prompt_texts(batch: Batch) -> list[str]:
    """The N prompts; "" for a missing one."""
    return [prompt or "" for prompt in batch.prompts or [""] * len(batch)]


def input_texts(batch: Batch, reads: str) -> list[str]:
    """The N inputs: completions if ``reads`` is "completion", else each prompt followed by its completion."""
    if reads == "completion":
        return list(batch.texts)
    return [prompt + completion for prompt, completion in zip(prompt_texts(batch), batch.texts, strict=True)]
