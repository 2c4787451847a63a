"""A callback that keeps a diary in the current directory."""

from pathlib import Path

from tiltlm import Callback


class Diary(Callback):
    def __init__(self):
        self.path = Path("diary.txt")

    def _write(self, line):
        with self.path.open("a") as file:
            file.write(line + "\n")

    def on_step_end(self, progress, metrics):
        self._write(f"step {progress.step} of {progress.max_steps}: KL {metrics.kl_p_pi.value:.6f}")

    def on_log(self, progress, metrics):
        self._write(f"log {progress.step}: ESS {metrics.ess.value:.6f}")

    def on_save(self, progress, checkpoint):
        self._write(f"save {progress.step}: {checkpoint.name}")
