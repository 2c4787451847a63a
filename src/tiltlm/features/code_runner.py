"""Run one program and its tests within limits. ``code.py`` starts this script in its own process.

    python -I -S code_runner.py SECONDS MEGABYTES PIPE < {"program": …, "tests": …, "word": …}

It writes the word to the pipe once every test has passed. A program that exits early writes nothing.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import sys
import types

FILE_BYTES = 2**20
OPEN_FILES = 64
NEW_USER, NEW_NET = 0x10000000, 0x40000000


def main() -> None:
    seconds, megabytes, pipe = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    job = json.load(sys.stdin)
    del sys.argv[1:]
    without_network()
    limit(seconds, megabytes)
    run(job["program"], job["tests"])
    os.write(pipe, job["word"].encode())


def without_network() -> None:
    """Move this process into an empty network, if the system allows that for a plain user."""
    with contextlib.suppress(Exception):
        import ctypes

        ctypes.CDLL(None).unshare(NEW_USER | NEW_NET)


def limit(seconds: float, megabytes: int) -> None:
    """Set those limits that this system has. The program cannot raise them again."""
    # Usually the parent ends this process. The alarm does if the parent is gone.
    signal.alarm(math.ceil(seconds) + 1)
    limits = {
        "RLIMIT_CPU": math.ceil(seconds),
        "RLIMIT_AS": megabytes * 2**20,
        "RLIMIT_FSIZE": FILE_BYTES,
        "RLIMIT_NOFILE": OPEN_FILES,
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": 0,
    }
    for name, value in limits.items():
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, name), (value, value))


def run(program: str, tests: str) -> None:
    """Run the program as the module ``solution``, then the tests with its names, then their functions ``test_…``."""
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    exec(compile(program, "<text>", "exec", dont_inherit=True), module.__dict__)
    names = dict(module.__dict__, __name__="tests")
    exec(compile(tests, "<tests>", "exec", dont_inherit=True), names)
    for name, value in list(names.items()):
        if name.startswith("test_") and callable(value) and value is not module.__dict__.get(name):
            value()


if __name__ == "__main__":
    main()
