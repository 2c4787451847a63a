"""JSON files of a run: without NaN, and each file or line is written whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tiltlm.errors import CheckpointError

_REMEDY = "Repair it, restore a copy, or start anew in another --output-dir."


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file: readers see the whole old or the whole new content. Raises CheckpointError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(temporary, "wb", buffering=0) as file:
                _write_fully(file, data)
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        _sync_directory(path.parent)


def is_unfinished(file: Path, path: Path) -> bool:
    """Whether ``file`` is a leftover of ``write_atomically(path, ...)`` in a killed process."""
    return re.fullmatch(rf"\.{re.escape(path.name)}\.\d+\.tmp", file.name) is not None


def remove_unfinished(path: Path) -> None:
    """Delete leftovers of killed processes next to ``path``."""
    with suppress(OSError):
        for file in path.parent.iterdir():
            if is_unfinished(file, path):
                file.unlink(missing_ok=True)


def write_object(path: Path, record: Mapping[str, Any]) -> None:
    """Replace a file by one JSON object; numbers that are not finite become null, estimates value and se."""
    write_atomically(path, _encode(record, indent=2))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises CheckpointError if it cannot be read."""
    with reading(path):
        data = path.read_bytes()
    return _parse(data, str(path))


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file by one line per record."""
    write_atomically(path, b"".join(_encode(record) for record in records))


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add one record as a line; if it cannot be written whole, the lines before it remain and nothing else."""
    line = _encode(record)
    with writing(path), open(path, "ab+", buffering=0) as file:
        end = _end_of_whole_lines(file)
        file.truncate(end)
        try:
            _write_fully(file, line)
        except BaseException:
            with suppress(OSError):
                file.truncate(end)
            raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every record in order, without an unfinished last line of a killed process; [] if there is no file."""
    if not path.exists():
        return []
    with reading(path):
        *lines, _unfinished = path.read_bytes().split(b"\n")
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of the file system into a CheckpointError that names the file and says that earlier data is safe."""
    try:
        yield
    except OSError as error:
        safe = "Nothing that was written before is lost"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"no space left on the disk for '{path}'. {safe}: free some space and go on with --resume."
        else:
            message = f"cannot write '{path}': {error.strerror or error}. {safe}."
        raise CheckpointError(message) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn errors of the file system into a CheckpointError that names the file."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot read '{path}': {error.strerror or error}.") from error


def _jsonable(value: Any) -> Any:
    """The value as JSON: estimates, paths and numbers of numpy and torch as plain values; NaN and infinity as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "to_json"):
        return _jsonable(value.to_json())
    if hasattr(value, "item"):
        return _jsonable(value.item())
    raise TypeError(f"run directories hold no {type(value).__name__}: {value!r}")


def _encode(record: Mapping[str, Any], indent: int | None = None) -> bytes:
    text = json.dumps(_jsonable(record), ensure_ascii=False, allow_nan=False, indent=indent) + "\n"
    # A lone surrogate cannot be UTF-8; as a backslash escape it is JSON for the same string.
    return text.encode("utf-8", errors="backslashreplace")


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except ValueError as error:
        raise CheckpointError(f"'{where}' is broken: it cannot be read as JSON ({error}). {_REMEDY}") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"'{where}' is broken: it is not a JSON object. {_REMEDY}")
    return record


def _end_of_whole_lines(file: IO[bytes]) -> int:
    """The position after the last newline; an unfinished line of a killed process may follow it."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return 0
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return size
    file.seek(0)
    return file.read().rfind(b"\n") + 1


def _write_fully(file: IO[bytes], data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(file.fileno(), rest) :]


def _sync_directory(path: Path) -> None:
    with suppress(OSError):  # Some file systems cannot sync a directory; the data itself is written.
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
