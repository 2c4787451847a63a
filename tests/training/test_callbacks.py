"""Callbacks are called when they were promised to be, with what they were promised."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiltlm.training.callbacks import Callback
from tiltlm.training.checkpoint import load_checkpoint
from tiltlm.training.metrics import StepMetrics
from tiltlm.training.progress import Progress
from tiny_world import World, build_trainer


class Diary(Callback):
    def __init__(self) -> None:
        self.entries: list[tuple[str, int]] = []
        self.progress: list[Progress] = []

    def on_step_end(self, progress: Progress, metrics: StepMetrics) -> None:
        assert metrics.progress is not None
        assert (metrics.progress.step, metrics.progress.sequences) == (progress.step, progress.sequences)
        self.entries.append(("step", progress.step))
        self.progress.append(progress)

    def on_log(self, progress: Progress, metrics: StepMetrics) -> None:
        self.entries.append(("log", progress.step))

    def on_save(self, progress: Progress, checkpoint: Path) -> None:
        # On disk by now, and whole.
        assert load_checkpoint(checkpoint)["step"] == progress.step
        self.entries.append(("save", progress.step))


def test_steps_logs_and_saves_come_in_order(world: World, tmp_path: Path) -> None:
    diary, other = Diary(), Diary()
    trainer = build_trainer(
        world,
        folder=tmp_path,
        callbacks=(diary, other),
        max_steps=5,
        logging_steps=2,
        save_steps=3,
        batch_size=10,
    )
    trainer.train()
    expected = [("step", 1), ("step", 2), ("log", 2), ("step", 3), ("save", 3), ("step", 4), ("log", 4)]
    # The last step is logged whatever its number.
    expected += [("step", 5), ("log", 5)]
    assert diary.entries == other.entries == expected
    sequences = [progress.sequences for progress in diary.progress]
    assert sequences == [600 + 10 * step for step in range(1, 6)]
    assert all(progress.max_steps == 5 for progress in diary.progress)
    seconds = [progress.seconds for progress in diary.progress]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_without_save_steps_nothing_is_saved(world: World, tmp_path: Path) -> None:
    diary = Diary()
    build_trainer(world, folder=tmp_path, callbacks=(diary,), max_steps=3, save_steps=0, batch_size=10).train()
    assert [kind for kind, _ in diary.entries].count("save") == 0
    assert list(tmp_path.iterdir()) == []


class Stop(Exception):
    pass


class Stopper(Callback):
    def on_step_end(self, progress: Progress, metrics: StepMetrics) -> None:
        if progress.step == 2:
            raise Stop


def test_an_exception_of_a_callback_stops_the_run(world: World) -> None:
    trainer = build_trainer(world, callbacks=(Stopper(),), max_steps=5, batch_size=10)
    with pytest.raises(Stop):
        trainer.train()
    assert trainer.step == 2


def test_a_callback_may_leave_everything_out(world: World, tmp_path: Path) -> None:
    trainer = build_trainer(world, folder=tmp_path, callbacks=(Callback(),), max_steps=2, save_steps=1, batch_size=10)
    assert trainer.train().status == "done"
