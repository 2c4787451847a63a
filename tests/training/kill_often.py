"""Run as a program: tunes a config in child processes that are killed at random moments, until one is left alone."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

from tiltlm.config import load_config
from tiltlm.job import tune_config


def main(config: str, folder: str, kills: str, seconds: str) -> int:
    """Exit code of the last child; each kill comes up to ``seconds`` after the child's start."""
    for left in range(int(kills), -1, -1):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                tune_config(load_config(config), Path(folder), resume=True)
                code = 0
            finally:
                os._exit(code)
        if left:
            moment = random.uniform(0, float(seconds))
            time.sleep(moment)
            os.kill(child, signal.SIGKILL)
            print(f"killed after {moment:.3f} s")
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
