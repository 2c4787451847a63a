"""Prompts and their columns, read from a list, a file (text, JSON, CSV, Parquet) or a data set."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiltlm.errors import UsageError, nearest

Prompt = str | list[dict[str, Any]]

# Arguments of a feature that tiltlm itself fills.
RESERVED = ("prompts", "completions", "completion_ids")


@dataclass(frozen=True)
class PromptData:
    """C prompts, each a string or a list of chat messages; each of the ``columns`` has C values, one per prompt."""

    prompts: tuple[Prompt, ...]
    columns: Mapping[str, tuple[Any, ...]]

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, rows: Iterable[int]) -> PromptData:
        """The prompts with these indices, and their columns."""
        kept = list(rows)
        columns = {name: tuple(values[i] for i in kept) for name, values in self.columns.items()}
        return PromptData(tuple(self.prompts[i] for i in kept), columns)

    def split(self, share: float, seed: int) -> tuple[PromptData, PromptData]:
        """Training and held-out prompts, each in their order; ``seed`` chooses a ``share`` of all to hold out.

        Raises UsageError if one of the two would be empty.
        """
        count = round(share * len(self))
        if not 0 < count < len(self):
            raise UsageError(
                f"prompts.held_out: {share:g} of {len(self)} prompts are {count}; at least one must be held out, and "
                f"at least one trained on"
            )
        held = set(random.Random(seed).sample(range(len(self)), count))
        return self.select(i for i in range(len(self)) if i not in held), self.select(sorted(held))


def parse_prompts(given: str | Sequence[Any], column: str = "prompt") -> PromptData:
    """Prompts in the forms of a run file: a list, the name of a file, or one string, which is the prompt.

    Raises UsageError that names the row.
    """
    if not isinstance(given, str):
        return prompt_rows(given, column, "the list")
    if Path(given).suffix in READERS or Path(given).is_file():
        return prompt_file(given, column)
    return PromptData((given,), {})


def prompt_file(path: str, column: str = "prompt") -> PromptData:
    """The prompts of a file: JSON lines, a JSON list, CSV or Parquet by its ending; else one prompt per line.

    ``column`` is the column of the prompt. Raises UsageError that names the row.
    """
    read = READERS.get(Path(path).suffix, _lines)
    try:
        rows = read(path)
    except UnicodeDecodeError as error:
        raise UsageError(f"prompts: {path} cannot be read as text ({error}); give a file in UTF-8") from error
    except OSError as error:
        raise UsageError(f"prompts: {path} cannot be read ({error})") from error
    return prompt_rows(rows, column, f"the file {path}")


def prompt_dataset(name: str, column: str = "prompt", *, subset: str | None = None, split: str = "train") -> PromptData:
    """The prompts of a data set on the hub or in a folder, read by the package ``datasets``. Raises UsageError."""
    from_hub = _datasets(f"the data set '{name}'").load_dataset
    try:
        rows = from_hub(name, subset, split=split).to_list()
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        shown = f"'{name}'" + (f", subset '{subset}'" if subset else "") + f", split '{split}'"
        raise UsageError(f"prompts.dataset: {shown} cannot be loaded: {reason}") from error
    return prompt_rows(rows, column, f"the data set '{name}'")


def prompt_rows(rows: Sequence[Any], column: str, source: str) -> PromptData:
    """The prompts of rows: prompts, or mappings with a prompt in ``column``. Raises UsageError that names the row.

    Other columns are kept if their values are plain: text, numbers, booleans, None, lists and mappings of these.
    """
    if not rows:
        raise UsageError(
            f"prompts: {source} has no prompts; give one string, a list, or a file with one prompt per line"
        )
    prompts: list[Prompt] = []
    names: dict[str, None] = {}
    for i, row in enumerate(rows, 1):
        place = f"prompts: row {i} of {source}"
        if isinstance(row, Mapping):
            if column not in row:
                raise UsageError(f"{place} has no column '{column}'; {nearest(column, map(str, row))}")
            names.update(dict.fromkeys(key for key in row if key != column))
        prompts.append(_prompt(row[column] if isinstance(row, Mapping) else row, place))
    columns = {
        name: tuple(row.get(name) if isinstance(row, Mapping) else None for row in rows)
        for name in names
        if isinstance(name, str) and name not in RESERVED
    }
    return PromptData(tuple(prompts), {name: values for name, values in columns.items() if all(map(_plain, values))})


def _prompt(given: Any, place: str) -> Prompt:
    if isinstance(given, str):
        return given
    if isinstance(given, list) and given and all(isinstance(message, Mapping) for message in given):
        for message in given:
            for key in ("role", "content"):
                if not isinstance(message.get(key), str):
                    raise UsageError(
                        f"{place}: a message has {key} {message.get(key)!r:.60}; expected text for 'role' and 'content'"
                    )
        return [dict(message) for message in given]
    raise UsageError(f"{place} is {given!r:.60}; expected text, or a list of messages with 'role' and 'content'")


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _plain(inner) for key, inner in value.items())
    return value is None or type(value) in (str, int, float, bool)


def _lines(path: str) -> list[Any]:
    return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


def _json_lines(path: str) -> list[Any]:
    lines = enumerate(Path(path).read_text(encoding="utf-8").split("\n"), 1)
    return [_json(line, f"line {number} of {path}") for number, line in lines if line.strip()]


def _json_list(path: str) -> list[Any]:
    read = _json(Path(path).read_text(encoding="utf-8"), path)
    if not isinstance(read, list):
        raise UsageError(f"prompts: {path} is not a list; write [...], or one JSON object per line in a .jsonl file")
    return read


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"prompts: {place} is not valid JSON: {error}") from error


def _csv(path: str) -> list[Any]:
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        rows = []
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise UsageError(
                        f"prompts: line {reader.line_num} of {path} has more or fewer fields than the header; "
                        f"put text with commas into double quotes"
                    )
                rows.append(row)
        except csv.Error as error:
            raise UsageError(f"prompts: line {reader.line_num} of {path} is not valid CSV: {error}") from error
    return rows


def _parquet(path: str) -> list[Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"No such file: {path}")
    read = _datasets(path).Dataset.from_parquet
    try:
        rows: list[Any] = read(path).to_list()
    except Exception as error:
        raise UsageError(f"prompts: {path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    return rows


def _datasets(wanted: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"prompts: to read {wanted}, `pip install 'tiltlm[data]'`") from error
    return datasets


READERS: dict[str, Callable[[str], list[Any]]] = {
    ".txt": _lines,
    ".jsonl": _json_lines,
    ".json": _json_list,
    ".csv": _csv,
    ".parquet": _parquet,
}
