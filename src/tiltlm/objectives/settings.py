"""Checks of what a user may set in ``method.args``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tiltlm.errors import UsageError, nearest


def number(name: str, value: Any, least: float, most: float = math.inf) -> None:
    """Raises UsageError unless the setting is a finite number from ``least`` to ``most``."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or not least <= value <= most:
        raise UsageError(f"method.args.{name}: {value!r} must be a number{_range(least, most)}")


def above_zero(name: str, value: Any) -> None:
    """Raises UsageError unless the setting is a finite number above 0."""
    number(name, value, -math.inf)
    if value <= 0:
        raise UsageError(f"method.args.{name}: {value!r} must be a number above 0")


def flag(name: str, value: Any) -> None:
    """Raises UsageError unless the setting is true or false."""
    if not isinstance(value, bool):
        raise UsageError(f"method.args.{name}: {value!r} must be true or false")


def choice(name: str, value: Any, valid: Sequence[str]) -> None:
    """Raises UsageError, with the nearest valid one, unless the setting is one of these names."""
    if value not in valid:
        raise UsageError(f"method.args.{name}: {value!r} is not known; {nearest(str(value), valid)}")


def _range(least: float, most: float) -> str:
    if math.isinf(least):
        return ""
    return f" from {least:g} to {most:g}" if math.isfinite(most) else f", at least {least:g}"
