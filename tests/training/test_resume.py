"""A run that was cut short and resumed is the run that was not, bit for bit."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tiltlm.training.callbacks import Callback
from tiltlm.training.checkpoint import load_base_sample, save_base_sample
from tiltlm.training.metrics import StepMetrics
from tiltlm.training.progress import Progress
from tiltlm.training.trainer import Trainer
from tiny_world import World, build_trainer

STEPS = 7
POOL: dict[str, Any] = {"method": "pooled", "pool": 130, "num_iterations": 3, "learning_rate": 0.01}

RUNS: dict[str, dict[str, Any]] = {
    "full, on-policy": {"rule": "on_policy"},
    "full, kept proposal": {"rule": "interval", "check_steps": 2, "method": "gdc"},
    "full, from the base": {"rule": "kl", "check_steps": 100},
    "lora, on-policy": {"rule": "on_policy", "lora": True},
    "lora, kept proposal": {"rule": "interval", "check_steps": 2, "lora": True},
    "published": {"rule": "published", "check_steps": 3, "batch_size": 20},
    "fit samples first": {"reuse_fit_samples": True, "batch_size": 130, "rule": "kl", "check_steps": 2},
    "sgd with momentum, cosine with warm-up": {
        "optim": "sgd",
        "optim_args": {"momentum": 0.9},
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
    },
    "adamw, linear": {"optim": "adamw", "lr_scheduler_type": "linear", "max_grad_norm": 0.5},
    "muon": {"optim": "muon", "lora": True},
    "pieces": {"per_device_train_batch_size": 7},
    "pool, kept proposal": {**POOL, "rule": "interval", "check_steps": 2},
    "pool, lora, on-policy, fit samples": {**POOL, "rule": "on_policy", "lora": True, "reuse_fit_samples": True},
    "pool, guided": {**POOL, "rule": "guided", "method": "gdc++"},
    "guided, on-policy": {"method": "guided", "rule": "on_policy", "num_iterations": 2, "reuse_fit_samples": True},
}


class Lines(Callback):
    """The lines of metrics.jsonl, without what a clock says."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def on_step_end(self, progress: Progress, metrics: StepMetrics) -> None:
        line = metrics.to_json()
        line.pop("seconds")
        self.lines.append(line)


def build(world: World, folder: Path, lines: Lines, settings: dict[str, Any], *more: Callback) -> Trainer:
    arguments = {"batch_size": 40, "max_steps": STEPS, "save_steps": 0, **settings}
    return build_trainer(world, folder=folder, callbacks=(lines, *more), **arguments)


def state(trainer: Trainer) -> dict[str, Any]:
    """Everything that the next step would depend on."""
    optimizer = trainer.optimizer.state_dict()
    return {
        "weights": {name: p.detach().clone() for name, p in trainer.roles.policy.model.named_parameters()},
        "proposal": trainer.roles.proposal_state(),
        "generator": trainer.drawer.state_dict()["generator"],
        "optimizer": optimizer["state"],
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in optimizer["param_groups"]],
        "scheduler": {k: v for k, v in trainer.scheduler.state_dict().items() if k != "_get_lr_called_within_step"},
        "partition": trainer.partition,
        "pool": trainer.replay.state_dict(),
        "objective": trainer.scorer.objective,
        "balance": trainer.scorer.minimum_variance.moments,
        "numbers": (
            trainer.step,
            str(trainer.drawer.proposal),
            trainer.drawer.queue.position,
            trainer.counter.sequences,
            trainer.counter.forward_passes,
        ),
    }


def assert_same(one: Any, other: Any, where: str = "state") -> None:
    """Equal to the last bit, with a path to what is not."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert one == other, where


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_uninterrupted_one(world: World, tmp_path: Path, name: str) -> None:
    whole_lines = Lines()
    whole = build(world, tmp_path / "whole", whole_lines, RUNS[name])
    whole.train()
    # Three sittings: two steps, two more, and the rest.
    lines = Lines()
    for steps in (2, 2, STEPS - 4):
        trainer = build(world, tmp_path / "parts", lines, RUNS[name])
        assert trainer.resume() is bool(lines.lines)
        for _ in range(steps):
            metrics = trainer.train_step()
            lines.on_step_end(trainer.progress, metrics)
        trainer.save()
    assert len(lines.lines) == STEPS
    assert lines.lines == whole_lines.lines
    assert_same(state(trainer), state(whole))
    if "kept" in name or "first" in name:
        assert str(trainer.drawer.proposal).startswith("step")
        assert trainer.roles.has_proposal


def test_the_base_sample_read_back_gives_the_same_steps(world: World, tmp_path: Path) -> None:
    save_base_sample(tmp_path, world.base_sample)
    again = load_base_sample(tmp_path, world.base)
    assert again is not None
    lines = []
    for sample in (world.base_sample, again):
        trainer = build_trainer(
            world, base_sample=sample, reuse_fit_samples=True, batch_size=250, rule="kl", check_steps=1
        )
        lines.append([trainer.train_step().to_json() | {"seconds": None} for _ in range(4)])
    assert lines[0] == lines[1]


def test_without_a_checkpoint_there_is_nothing_to_resume(world: World, tmp_path: Path) -> None:
    assert not build_trainer(world, folder=tmp_path / "nowhere").resume()
    trainer = build_trainer(world)
    trainer.save()
    assert not trainer.resume()


def test_another_seed_is_another_run(world: World) -> None:
    first, second = (build_trainer(world, seed=seed, batch_size=50) for seed in (1, 2))
    assert first.train_step().to_json()["kl_p_pi"] != second.train_step().to_json()["kl_p_pi"]


class Signal(Callback):
    """Sends this process a signal within a step."""

    def __init__(self, number: int, step: int, times: int = 1) -> None:
        self.number, self.step, self.times = number, step, times

    def on_step_end(self, progress: Progress, metrics: StepMetrics) -> None:
        if progress.step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [3, STEPS])
@pytest.mark.serial
def test_a_signal_finishes_the_step_and_saves(world: World, tmp_path: Path, number: int, step: int) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    whole_lines, lines = Lines(), Lines()
    whole = build(world, tmp_path / "whole", whole_lines, {})
    whole.train()
    stopped = build(world, tmp_path / "parts", lines, {}, Signal(number, step))
    outcome = stopped.train()
    assert outcome.status == "interrupted"
    assert outcome.progress.step == step
    assert [path.name for path in (tmp_path / "parts").iterdir()] == [f"step-{step:06d}"]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    resumed = build(world, tmp_path / "parts", lines, {})
    assert resumed.resume()
    assert resumed.train().status == "done"
    assert lines.lines == whole_lines.lines
    assert_same(state(resumed), state(whole))


@pytest.mark.serial
def test_a_second_ctrl_c_stops_at_once(world: World, tmp_path: Path) -> None:
    lines = Lines()
    trainer = build(world, tmp_path, lines, {"save_steps": 2}, Signal(signal.SIGINT, 3, times=2))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.step == 3
    assert [path.name for path in tmp_path.iterdir()] == ["step-000002"]


@pytest.mark.serial
def test_a_second_sigterm_waits_like_the_first(world: World, tmp_path: Path) -> None:
    trainer = build(world, tmp_path, Lines(), {}, Signal(signal.SIGTERM, 3, times=3))
    assert trainer.train().status == "interrupted"
    assert trainer.step == 3
