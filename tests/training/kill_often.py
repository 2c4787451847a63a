"""Run as a program: tunes a config in child processes that are killed at random moments, until one is left alone."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

# What children would import later is imported once, here; nothing has run yet, so that forking is safe.
import accelerate  # noqa: F401
import peft  # noqa: F401
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast  # noqa: F401

from tiltlm.app.tune import tune_config
from tiltlm.config.run import load_config


def wait_for_steps(child: int, metrics: Path, began: int) -> None:
    """Until the child, started at ``began`` (ns), has touched the metrics: from then on it takes steps."""
    while not metrics.exists() or metrics.stat().st_mtime_ns < began:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.001)


def main(config: str, folder: str, kills: str, seconds: str) -> int:
    """Exit code of the last child. Two kills come while a run starts, the others within ``seconds`` of its steps."""
    for kill in range(int(kills) + 1):
        began = time.time_ns()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                tune_config(load_config(config), Path(folder), resume=True)
                code = 0
            finally:
                os._exit(code)
        if kill < int(kills):
            if kill >= 2:
                wait_for_steps(child, Path(folder) / "metrics.jsonl", began)
            moment = random.uniform(0, float(seconds))
            time.sleep(moment)
            os.kill(child, signal.SIGKILL)
            print(f"kill {kill + 1} after {moment:.3f} s", flush=True)
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
