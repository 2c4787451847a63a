"""Batch, the input of features, and spans of characters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tiltlm.errors import UsageError

Span = tuple[int, int]


@dataclass(frozen=True)
class Batch:
    """N texts (completions) with their prompts, token ids and data columns, N entries each.

    ``messages`` holds the chat messages of prompts that are chats, None for other prompts.
    """

    texts: Sequence[str]
    prompts: Sequence[str | None] | None = None
    completion_ids: Sequence[Sequence[int]] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    messages: Sequence[Sequence[Mapping[str, Any]] | None] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.texts, str):
            raise UsageError("texts: expected a list of texts, got one string; write [text]")
        for name in ("prompts", "completion_ids", "messages"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self):
                raise UsageError(f"{name}: {len(values)} entries for {len(self)} texts; there must be one per text")

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, start: int, stop: int) -> Batch:
        """The rows from ``start`` up to ``stop``. A column that is not a list of N values stays whole."""
        whole = len(self)

        def cut(value: Any) -> Any:
            sliceable = hasattr(value, "__len__") and hasattr(value, "__getitem__")
            per_text = sliceable and not isinstance(value, str | Mapping) and len(value) == whole
            return value[start:stop] if per_text else value

        return replace(
            self,
            texts=self.texts[start:stop],
            prompts=cut(self.prompts),
            completion_ids=cut(self.completion_ids),
            columns={name: cut(value) for name, value in self.columns.items()},
            messages=cut(self.messages),
        )


def merged(spans: Iterable[Span]) -> list[Span]:
    """The union of the spans, sorted, without overlap."""
    result: list[Span] = []
    for start, end in sorted(spans):
        if result and start < result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result
