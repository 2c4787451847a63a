"""Features are measured beside the passes, and batches drawn ahead: what a run computes is the same to the last bit."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_accounting import PassCounter
from test_resume import STEPS, Lines, assert_same, build, state
from torch import Tensor

from tiltlm.errors import FeatureError
from tiltlm.features import Feature, callable_feature
from tiltlm.features.batch import Batch as Texts
from tiltlm.lm import LanguageModel
from tiltlm.objectives import Guided
from tiltlm.targets import Term, TiltedTarget, draw_base_sample
from tiltlm.targets.base_sample import measure_samples
from tiltlm.training.trainer import Trainer
from tiny_world import LENGTH, World, build_trainer

PATIENCE = 5.0


def measuring(world: World, feature: Feature) -> World:
    """The world with a target that rewards this feature alone."""
    sample = draw_base_sample(world.base, [feature], 60, None, LENGTH, seed=1)
    return replace(world, target=TiltedTarget((Term(feature, "reward", coefficient=0.5),)), base_sample=sample)


def test_features_are_measured_in_a_thread_of_their_own(world: World) -> None:
    threads: list[threading.Thread] = []
    busy = threading.Lock()

    def lengths(texts: Sequence[str]) -> list[float]:
        threads.append(threading.current_thread())
        assert busy.acquire(blocking=False), "a feature is never called twice at a time"
        busy.release()
        return [float(len(text)) for text in texts]

    trainer = build_trainer(measuring(world, callable_feature(lengths)), batch_size=20)
    assert set(threads) == {threading.main_thread()}
    threads.clear()
    for _ in range(3):
        trainer.train_step()
    assert len(threads) == 3
    assert threading.main_thread() not in threads
    assert all(thread.daemon for thread in threads)


@pytest.mark.parametrize(("rule", "lora"), [("on_policy", False), ("on_policy", True), ("kl", False)])
def test_features_are_measured_while_the_models_read(
    world: World, rule: str, lora: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A feature that waits for a pass to begin: measured before the pass, it would wait for ever."""
    reading = threading.Event()
    reading.set()

    def patient(texts: Sequence[str]) -> list[float]:
        if not reading.wait(PATIENCE):
            raise TimeoutError("no model has read anything")
        return [float(len(text)) for text in texts]

    trainer = build_trainer(measuring(world, callable_feature(patient)), rule=rule, lora=lora, batch_size=20)
    read = LanguageModel.read

    def noticed(model: LanguageModel, samples: Any) -> Any:
        found = read(model, samples)
        reading.set()
        return found

    monkeypatch.setattr(LanguageModel, "read", noticed)
    for _ in range(2):
        reading.clear()
        trainer.train_step()
        assert reading.is_set()


class Mistake(FeatureError):
    """A user's own error."""


def test_an_error_of_a_feature_reaches_the_caller(world: World) -> None:
    failing = False
    mistake = Mistake("no such word list")

    def lengths(texts: Sequence[str], error: Exception) -> list[float]:
        if failing:
            raise error
        return [float(len(text)) for text in texts]

    for error, message in ((mistake, "no such word list"), (KeyError("score"), "feature 'broken' raised KeyError")):
        failing = False
        feature = callable_feature(partial(lengths, error=error), name="broken")
        trainer = build_trainer(measuring(world, feature), batch_size=20)
        trainer.train_step()
        failing = True
        weights = [p.detach().clone() for p in trainer.parameters.values()]
        with pytest.raises(FeatureError, match=message) as caught:
            trainer.train_step()
        assert (caught.value if error is mistake else caught.value.__cause__) is error
        assert trainer.step == 2
        # Nothing has been learned of a batch that could not be measured.
        assert all(torch.equal(a, b) for a, b in zip(weights, trainer.parameters.values(), strict=True))


class Asked(Future[Tensor]):
    """Measures when it is asked and not before."""

    def __init__(self, work: Callable[[], Tensor]) -> None:
        super().__init__()
        self.work = work

    def result(self, timeout: float | None = None) -> Tensor:
        if not self.done():
            self.set_result(self.work())
        return super().result(timeout)


class Slowest:
    """In place of the thread: features that take longer than whatever else a step does, without a clock."""

    def submit(self, function: Callable[..., Tensor], *args: Any) -> Future[Tensor]:
        return Asked(partial(function, *args))


def slow(trainer: Trainer) -> Trainer:
    trainer.drawer.worker = Slowest()  # type: ignore[assignment]
    return trainer


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Whether any wait for features is worth drawing ahead, or none."""

    def set_worth(worth: bool) -> None:
        monkeypatch.setattr("tiltlm.training.trainer.WORTH_DRAWING_AHEAD", 0.0 if worth else math.inf)

    return set_worth


# Each run, and whether a batch is held ahead after each of its steps: never after the first, as nothing has been waited
# for by then, nor after one that may change the proposal, nor after the last.
_, X = False, True
RUNS: dict[str, tuple[dict[str, Any], list[bool]]] = {
    "interval": ({"rule": "interval", "check_steps": 3, "method": "gdc"}, [_, X, _, X, X, _, _]),
    "interval, lora": ({"rule": "interval", "check_steps": 3, "lora": True}, [_, X, _, X, X, _, _]),
    "kl": ({"rule": "kl", "check_steps": 2}, [_, _, X, _, X, _, _]),
    "published": ({"rule": "published", "check_steps": 3, "batch_size": 20}, [_, X, _, X, X, _, _]),
    "guided": ({"rule": "guided", "method": "guided"}, [_, X, X, X, X, X, _]),
    "guided, lora": ({"rule": "guided", "method": "gdc++", "lora": True}, [_, X, X, X, X, X, _]),
    "fit samples first": (
        {"rule": "kl", "check_steps": 6, "reuse_fit_samples": True, "batch_size": 200},
        [_, _, _, X, X, _, _],
    ),
}
NEVER: dict[str, dict[str, Any]] = {
    "on-policy": {"rule": "on_policy"},
    "on-policy, gdc": {"rule": "on_policy", "method": "gdc"},
    "a guide that leans": {"rule": "guided", "method": Guided(feedback=0.3)},
    "always due": {"rule": "interval", "check_steps": 1},
}


def run(world: World, folder: Path, settings: dict[str, Any]) -> tuple[Trainer, Lines, list[bool]]:
    """A whole run with slow features; says after each step whether a batch is held ahead."""
    lines = Lines()
    trainer = slow(build(world, folder, lines, settings))
    ahead = []
    for _step in range(STEPS):
        lines.on_step_end(trainer.progress, trainer.train_step())
        ahead.append(trainer.drawer.ahead is not None)
    return trainer, lines, ahead


@pytest.mark.parametrize("name", RUNS)
def test_drawing_ahead_changes_nothing(world: World, tmp_path: Path, name: str, eager: Callable[[bool], None]) -> None:
    settings, expected = RUNS[name]
    eager(False)
    plain, plain_lines, never = run(world, tmp_path, settings)
    assert not any(never)
    eager(True)
    trainer, lines, ahead = run(world, tmp_path, settings)
    assert ahead == expected
    assert lines.lines == plain_lines.lines
    assert_same(state(trainer), state(plain))
    assert trainer.counter.sequences == plain.counter.sequences
    if "guided" not in name:
        assert str(trainer.drawer.proposal).startswith("step")


@pytest.mark.parametrize("name", NEVER)
def test_nothing_is_drawn_ahead_where_the_proposal_may_change(
    world: World, tmp_path: Path, name: str, eager: Callable[[bool], None]
) -> None:
    eager(True)
    trainer, _lines, ahead = run(world, tmp_path, NEVER[name])
    assert not any(ahead)
    # It would have been, for all that features took.
    assert trainer.timer.seconds["features"] > 0


def test_features_that_take_no_time_are_not_worth_it(world: World, tmp_path: Path) -> None:
    trainer, _lines, ahead = run(world, tmp_path, RUNS["guided"][0])
    assert 0 < trainer.timer.seconds["features"] < 0.05
    assert not any(ahead)


def test_a_batch_that_is_measured_by_then_has_nothing_beside_which_to_draw(
    world: World, tmp_path: Path, eager: Callable[[bool], None]
) -> None:
    eager(True)
    trainer = build(world, tmp_path, Lines(), RUNS["guided"][0])

    class Fastest:
        def submit(self, function: Callable[..., Tensor], *args: Any) -> Future[Tensor]:
            future: Future[Tensor] = Future()
            future.set_result(function(*args))
            return future

    trainer.drawer.worker = Fastest()  # type: ignore[assignment]
    for _step in range(3):
        trainer.train_step()
        assert trainer.drawer.ahead is None


@dataclass(frozen=True, kw_only=True)
class Sleepy(Feature):
    """Another feature, after a nap."""

    inner: Feature

    def compute(self, batch: Texts) -> Sequence[float] | Tensor:
        time.sleep(0.03)
        return self.inner.compute(batch)


@pytest.mark.serial
def test_a_feature_that_sleeps_has_a_batch_drawn_meanwhile(
    world: World, tmp_path: Path, eager: Callable[[bool], None]
) -> None:
    """The same with the real thread: sampling goes on while it sleeps."""
    first, *others = world.target.terms
    sleepy = Sleepy(name=first.feature.name, binary=True, inner=first.feature)
    slept = replace(world, target=TiltedTarget((replace(first, feature=sleepy), *others)))
    found = []
    for worth in (False, True):
        eager(worth)
        lines = Lines()
        trainer = build(slept, tmp_path, lines, {"rule": "kl", "check_steps": 100})
        ahead = []
        for _step in range(STEPS):
            lines.on_step_end(trainer.progress, trainer.train_step())
            ahead.append(trainer.drawer.ahead is not None)
        found.append((lines.lines, state(trainer)))
    assert any(ahead)
    assert_same(found[0], found[1])


HELD = [(name, k + 1) for name, (_settings, ahead) in RUNS.items() for k, held in enumerate(ahead) if held]


@pytest.mark.parametrize(("name", "step"), HELD, ids=[f"{name}, {step}" for name, step in HELD])
def test_a_run_cut_short_with_a_batch_in_hand_goes_on_as_if_it_had_not_been(
    world: World, tmp_path: Path, name: str, step: int, eager: Callable[[bool], None]
) -> None:
    eager(True)
    settings, _ahead = RUNS[name]
    whole, whole_lines, _ahead = run(world, tmp_path / "whole", settings)
    lines = Lines()
    first = slow(build(world, tmp_path / "parts", lines, settings))
    for _step in range(step):
        lines.on_step_end(first.progress, first.train_step())
    assert first.drawer.ahead is not None
    first.save()
    # Saving does not disturb the run that goes on.
    again = [first.train_step().to_json() | {"seconds": None} for _step in range(step, STEPS)]
    second = slow(build(world, tmp_path / "parts", lines, settings))
    assert second.resume()
    for _step in range(step, STEPS):
        lines.on_step_end(second.progress, second.train_step())
    assert lines.lines == whole_lines.lines
    assert [{k: v for k, v in line.items() if k != "seconds"} for line in again] == whole_lines.lines[step:]
    assert_same(state(second), state(whole))
    assert_same(state(first), state(whole))


def test_a_batch_counts_when_it_is_handed_out(
    world: World, tmp_path: Path, eager: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    eager(True)
    trainer = slow(build(world, tmp_path, Lines(), RUNS["guided"][0]))
    drawn, sequences, forward = trainer.counter.sequences, trainer.counter.sequences, trainer.counter.forward_passes
    passes = PassCounter(monkeypatch)
    trainer.train_step()
    assert passes.taken() == (40, 120)
    trainer.train_step()
    # This one's own, and the next one's samples.
    assert passes.taken() == (80, 160)
    assert trainer.counter.sequences - drawn == trainer.counter.sequences - sequences == 80
    assert trainer.counter.forward_passes - forward == 240
    held = trainer.drawer.ahead
    assert held is not None
    assert not held.is_measured
    handed_out = trainer.draw()
    assert handed_out is held
    # Its samples were drawn; those of the batch after it are now.
    assert passes.taken() == (40, 40)
    assert trainer.counter.sequences - drawn == trainer.counter.sequences - sequences == 120
    assert trainer.drawer.ahead is not None
    assert trainer.drawer.ahead is not handed_out


def test_the_order_of_batches_is_that_of_the_seed(world: World, tmp_path: Path, eager: Callable[[bool], None]) -> None:
    """Also with several prompts, which take turns across batches."""
    prompts = ["a", "b a", None, "d", "b"]
    sample = draw_base_sample(world.base, world.target.features, 12, prompts, LENGTH, seed=0)
    drawn: list[list[Any]] = []
    for worth in (False, True):
        eager(worth)
        trainer = slow(
            build(
                replace(world, base_sample=sample), tmp_path, Lines(), {"rule": "kl", "check_steps": 9, "batch_size": 7}
            )
        )
        trainer.step, trainer.waited = 1, 1.0
        batches = [trainer.draw() for _step in range(4)]
        assert (trainer.drawer.ahead is not None) == worth
        drawn.append([(b.samples.tokens, b.samples.proposal_logprob, list(b.samples.prompt_texts)) for b in batches])
        for batch in batches:
            assert torch.equal(batch.features, measure_samples(world.target.features, batch.samples))
    assert_same(drawn[0], drawn[1])


def test_an_error_waits_for_the_step_whose_batch_it_is_of(
    world: World, tmp_path: Path, eager: Callable[[bool], None]
) -> None:
    eager(True)
    calls = 0

    def fragile(texts: Sequence[str]) -> list[float]:
        nonlocal calls
        calls += 1
        # The first is the sample that the world begins with.
        if calls == 4:
            raise Mistake("the third batch is bad")
        return [float("a" in text) for text in texts]

    trainer = slow(
        build(measuring(world, callable_feature(fragile)), tmp_path, Lines(), {"rule": "kl", "check_steps": 9})
    )
    trainer.train_step()
    trainer.train_step()
    assert trainer.drawer.ahead is not None
    with pytest.raises(Mistake, match="third batch"):
        trainer.train_step()
    assert trainer.step == 3
