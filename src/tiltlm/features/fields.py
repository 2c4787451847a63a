"""What of a completion and its prompt a feature reads."""

from __future__ import annotations

from typing import Any

from tiltlm.errors import UsageError, nearest
from tiltlm.features.batch import Batch

READS = ("completion", "text")


def check_reads(feature: str, reads: Any, valid: tuple[str, ...] = READS) -> str:
    """What stands in the run file, once it is known to be right. Raises UsageError."""
    if reads not in valid:
        raise UsageError(f"{feature}.reads: {reads!r} is not known; {nearest(str(reads), valid)}")
    return str(reads)


def prompt_texts(batch: Batch) -> list[str]:
    """The N prompts, "" where there is none."""
    return [prompt or "" for prompt in batch.prompts or [""] * len(batch)]


def input_texts(batch: Batch, reads: str) -> list[str]:
    """The N ``completion``s alone, or the whole ``text``: each prompt with its completion after it."""
    if reads == "completion":
        return list(batch.texts)
    return [prompt + completion for prompt, completion in zip(prompt_texts(batch), batch.texts, strict=True)]
