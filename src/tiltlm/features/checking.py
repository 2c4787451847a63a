"""The check of a feature's return value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tiltlm.errors import FeatureError
from tiltlm.features.batch import Batch

EXPECTED = "expected one finite number per text"


def checked_values(output: Any, batch: Batch, *, name: str, binary: bool) -> Tensor:
    """The output of a feature as float64 [N]. Raises FeatureError if a value is not finite, or not 0 or 1 if binary."""
    complaint = f"feature '{name}' returned"
    if output is None:
        raise FeatureError(f"{complaint} None; {EXPECTED} (is a `return` missing?)")
    if hasattr(output, "shape") and tuple(output.shape) != (len(batch),):
        raise FeatureError(f"{complaint} an array of shape {tuple(output.shape)}; expected shape ({len(batch)},)")
    if isinstance(output, str | bytes | Mapping) or not isinstance(output, Iterable):
        raise FeatureError(f"{complaint} {_shortened(output)} ({type(output).__name__}); {EXPECTED}, in a list")
    entries = output.tolist() if hasattr(output, "tolist") else list(output)
    if len(entries) != len(batch):
        raise FeatureError(f"{complaint} {len(entries)} values for {len(batch)} texts; {EXPECTED}")
    numbers = [_number(entry) for entry in entries]
    for row, number in enumerate(numbers):
        if number is None or not math.isfinite(number):
            hint = "; TRL would skip that text, a target needs a number for each" if entries[row] is None else ""
            raise FeatureError(
                f"{complaint} {_shortened(entries[row])} for {described_row(batch, row)}; {EXPECTED}{hint}"
            )
        if binary and number not in (0.0, 1.0):
            raise FeatureError(
                f"{complaint} {number:g} for {described_row(batch, row)}; it is declared binary; expected 0 or 1"
            )
    return torch.tensor(numbers, dtype=torch.float64)


def _number(entry: Any) -> float | None:
    if entry is None or isinstance(entry, str | bytes):
        return None
    try:
        return float(entry)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def _shortened(value: Any, width: int = 60) -> str:
    if isinstance(value, str) and len(value) > width:
        value = value[:width] + "…"
    shown = repr(value)
    return shown if len(shown) <= width + 20 else shown[: width + 20] + "…"


def described_row(batch: Batch, row: int) -> str:
    """The number of the text and its beginning, for errors."""
    return f"text {row + 1} of {len(batch)}, {_shortened(batch.texts[row])}"
