"""A feature that reads a column of the data: whether a text speaks of its person with the pronouns in that row."""

from __future__ import annotations

import re
from typing import Any


def fitting_pronoun(completions: list[str], pronouns: list[list[str]], **columns: Any) -> list[float]:
    """1 where the completion holds one of its prompt's pronouns."""
    words = [set(re.findall(r"\w+", text.lower())) for text in completions]
    return [float(not found.isdisjoint(wanted)) for found, wanted in zip(words, pronouns, strict=True)]
