"""A feature with a column of the data: whether a text has one of the pronouns in its prompt's row."""

from __future__ import annotations

import re
from typing import Any


def fitting_pronoun(completions: list[str], pronouns: list[list[str]], **columns: Any) -> list[float]:
    """1 if the completion has one of its prompt's pronouns, else 0."""
    words = [set(re.findall(r"\w+", text.lower())) for text in completions]
    return [float(not found.isdisjoint(wanted)) for found, wanted in zip(words, pronouns, strict=True)]
