"""One process of a study: draws a task's reference, or runs and measures one run, as its standard input says."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from tiltlm.config.run import parse_config
from tiltlm.config.study import CurveSection, ReferenceSection
from tiltlm.errors import TiltError


def work(job: dict[str, Any]) -> str:
    """Do one job; returns ``done`` or ``interrupted``. Raises TiltError for errors that the user can fix."""
    from tiltlm.app.display import Display, plain_console
    from tiltlm.app.load import load_policy
    from tiltlm.app.tune import finished, tune_config
    from tiltlm.runs.directory import RunDirectory
    from tiltlm.study.curve_callback import CurveCallback, is_measured, measure_end
    from tiltlm.study.reference import make_reference

    config, folder, console = parse_config(job["config"]), Path(job["folder"]), plain_console()
    if job["kind"] == "reference":
        make_reference(config, ReferenceSection(**job["reference"]), folder, Display(console))
        return "done"
    run, reference = RunDirectory(folder), Path(job["reference"])
    policy = None
    if finished(config, folder) is None:
        curve = CurveCallback(run, reference, config, CurveSection(**job["curve"]))
        outcome = tune_config(config, folder, resume=True, console=console, callbacks=[curve], fit_dir=reference)
        if outcome.status == "interrupted":
            return "interrupted"
        policy = outcome.policy
    if not is_measured(run, reference):
        policy = policy or load_policy(run, config.device)[1]
        measure_end(run, policy, reference, config, job["scored"])
    # A finished run is not resumed, and checkpoints of a large model take most of its disk space.
    for checkpoint in run.checkpoint_dir.glob("step-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    return "done"


def main() -> None:
    """Read the job, do it, and write the result as JSON."""
    job = json.load(sys.stdin)
    threading.Thread(target=_stop_with, args=(os.getppid(),), daemon=True).start()
    result: dict[str, str | None] = {"status": "failed", "error": None}
    from tiltlm.app.display import quiet_libraries

    quiet_libraries()
    try:
        result = {"status": work(job), "error": None}
    except KeyboardInterrupt:
        result = {"status": "interrupted", "error": None}
    except TiltError as error:
        result["error"] = str(error).strip()
        print(f"error: {error}", file=sys.stderr)
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    print(json.dumps(result), flush=True)


def _stop_with(parent: int) -> None:
    """Stop, as Ctrl-C does, if the parent process ends: no one would read the result."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
