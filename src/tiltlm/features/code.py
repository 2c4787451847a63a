"""Features of Python code: it compiles, or it passes tests."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from tiltlm.errors import FeatureError, UsageError, nearest
from tiltlm.features.batch import Batch
from tiltlm.features.feature import Feature
from tiltlm.features.fields import check_reads, input_texts
from tiltlm.features.kinds import feature_kind

CHECKS = ("compiles",)
RUNNER = Path(__file__).with_name("code_runner.py")
# A block without an end extends to the end of the text.
FENCED = re.compile(r"^```[ \t]*(?:python3?|py)[ \t]*\n(.*?)(?:^```|\Z)", re.MULTILINE | re.DOTALL | re.IGNORECASE)
# Further programs at the same time would only wait for a core and reach their time limit.
MAX_PROCESSES = 8


@dataclass(frozen=True, kw_only=True)
class Code(Feature):
    """1 where the text is Python code that compiles and passes the ``tests``, if there are any; else 0."""

    tests: str | None
    timeout: float
    memory: int
    reads: str

    def compute(self, batch: Batch) -> list[float]:
        programs = [program_of(text) for text in input_texts(batch, self.reads)]
        distinct = list(dict.fromkeys(programs))
        passed = dict(zip(distinct, map(compiles, distinct), strict=True))
        if self.tests is not None:
            to_run = [program for program in distinct if passed[program]]
            with ThreadPoolExecutor(max_workers=min(MAX_PROCESSES, os.cpu_count() or 1)) as pool:
                passed.update(zip(to_run, pool.map(self._passes, to_run), strict=True))
        return [float(passed[program]) for program in programs]

    def _passes(self, program: str) -> bool:
        return passes(program, self.tests or "", self.timeout, self.memory)


@feature_kind("code")
def code_feature(
    check: str = "compiles",
    passes: str | Path | None = None,
    timeout: float = 2.0,
    memory: int = 256,
    reads: str = "completion",
) -> Code:
    """1 where the text is Python code that ``compiles`` here; with ``passes``, where it also passes these tests.

    ``passes`` is a file that ends in ``.py`` or the tests themselves: statements such as ``assert f(2) == 4``, which
    see the names of the program, and functions ``test_…`` without arguments, which are called. Each program runs in its
    own process, without site packages, in an empty folder, for at most ``timeout`` seconds and with at most ``memory``
    megabytes. These limits are no sandbox. If the text has fenced ```python blocks, only these are the program. Raises
    UsageError for tests that cannot be read or do not compile.
    """
    if check not in CHECKS:
        raise UsageError(f"code.check: {check!r} is not known; {nearest(str(check), CHECKS)}, or 'passes' with tests")
    number = isinstance(timeout, int | float) and not isinstance(timeout, bool)
    if not number or not 0 < timeout < math.inf:
        raise UsageError(f"code.timeout: expected seconds above 0, got {timeout!r}")
    if not isinstance(memory, int) or isinstance(memory, bool) or memory < 32:
        raise UsageError(f"code.memory: expected a whole number of megabytes, at least 32, got {memory!r}")
    return Code(
        name="compiles" if passes is None else "passes tests",
        binary=True,
        tests=None if passes is None else _tests(passes),
        timeout=float(timeout),
        memory=memory,
        reads=check_reads("code", reads),
    )


def program_of(text: str) -> str:
    """The text's fenced blocks of Python, joined; the whole text if it has none."""
    blocks = FENCED.findall(text)
    return "\n".join(blocks) if blocks else text


def compiles(program: str) -> bool:
    """Whether the Python version that runs this process compiles the program."""
    try:
        with warnings.catch_warnings():
            for category in (SyntaxWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", category=category)
            compile(program, "<text>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError):
        return False
    return True


@lru_cache(maxsize=2**14)
def passes(program: str, tests: str, timeout: float, memory: int) -> bool:
    """Whether the program passes the tests in its own process, within ``timeout`` seconds and ``memory`` MB.

    Results are cached, because a policy writes the same programs again. Raises FeatureError on other systems than
    Linux and macOS.
    """
    if os.name != "posix":
        raise FeatureError("code: tests run on Linux and macOS only; on this system use {code: compiles}")
    word = secrets.token_hex(16)
    # A pipe, not the exit status: a program can exit with any status.
    answer, pipe = os.pipe()
    with tempfile.TemporaryDirectory(prefix="tiltlm-code-") as folder, tempfile.TemporaryFile("w+") as job:
        json.dump({"program": program, "tests": tests, "word": word}, job)
        job.seek(0)
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(RUNNER), str(timeout), str(memory), str(pipe)],
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder},
                stdin=job,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[pipe],
                start_new_session=True,
            )
        except BaseException:
            os.close(answer)
            raise
        finally:
            os.close(pipe)
        try:
            return _received(answer, time.monotonic() + timeout) == word.encode()
        finally:
            # Before process.wait(): until then no other process can get this group id.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(answer)


def _received(pipe: int, deadline: float) -> bytes:
    """The bytes written to the pipe before the deadline; b"" if it is closed or the deadline passes."""
    waiting = select.poll()
    waiting.register(pipe, select.POLLIN)
    milliseconds = max(0, math.ceil(1000 * (deadline - time.monotonic())))
    return os.read(pipe, 64) if waiting.poll(milliseconds) else b""


def _tests(passes: str | Path) -> str:
    """The source of the tests. Raises UsageError for an unreadable file and for tests that do not compile."""
    if not isinstance(passes, str | Path) or not str(passes).strip():
        raise UsageError(f"code.passes: expected a file of tests or the tests themselves, got {passes!r}")
    source, where = str(passes), "the tests"
    if source.strip().endswith(".py") and "\n" not in source.strip():
        where = f"'{source.strip()}'"
        try:
            source = Path(source.strip()).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise UsageError(f"code.passes: cannot read {where}: {reason}") from error
    try:
        compile(source, "<tests>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        line = f" (line {error.lineno})" if isinstance(error, SyntaxError) else ""
        reason = error.msg if isinstance(error, SyntaxError) else str(error)
        raise UsageError(f"code.passes: {where} do not compile: {reason}{line}") from error
    return source
