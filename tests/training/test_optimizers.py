"""Optimizers and schedules by name: what is known works, what is not is an error with the nearest."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from transformers import SchedulerType

from tiltlm.errors import UsageError
from tiltlm.training.acceleration import Trackers
from tiltlm.training.optimizers import optimizer_class
from tiny_world import World, build_trainer

OPTIMIZERS = sorted(
    name
    for name, value in vars(torch.optim).items()
    if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
)
# These need something that a sampled gradient on a language model cannot give.
REFUSED = {"LBFGS": "loss several times", "SparseAdam": "sparse gradients", "Muon": "2D parameters"}
FURTHER: dict[str, dict[str, Any]] = {
    "warmup_stable_decay": {"num_decay_steps": 1},
    "cosine_with_min_lr": {"min_lr": 1e-5},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-5},
}
FOLLOW_A_METRIC = {"reduce_lr_on_plateau", "greedy"}


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - set(REFUSED)))
def test_every_optimizer_of_torch_moves_the_policy(world: World, name: str) -> None:
    trainer = build_trainer(world, optim=name.lower(), batch_size=20)
    before = [p.detach().clone() for p in trainer.parameters.values()]
    for _ in range(2):
        trainer.train_step()
    assert type(trainer.optimizer.optimizer) is getattr(torch.optim, name)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.parameters.values(), strict=True))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_work_is_refused_with_the_reason(world: World, name: str) -> None:
    with pytest.raises(UsageError, match=REFUSED[name]):
        build_trainer(world, optim=name)


def test_muon_takes_matrices_such_as_those_of_lora(world: World) -> None:
    trainer = build_trainer(world, optim="muon", lora=True, batch_size=20)
    trainer.train_step()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.Muon)


@pytest.mark.parametrize(("wrong", "meant"), [("adaam", "adam"), ("AdamW8bit", "adamw"), ("sdg", "sgd")])
def test_an_unknown_optimizer_is_an_error_with_the_nearest(wrong: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"training.optim: '{wrong}' .*did you mean '{meant}'"):
        optimizer_class(wrong)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [({"beta": 0.9}, "beta"), ({"betas": [2.0, 0.9]}, "2.0"), ({"weight_decay": -1.0}, "weight_decay")],
)
def test_arguments_that_an_optimizer_refuses_are_named(world: World, arguments: dict[str, Any], part: str) -> None:
    with pytest.raises(UsageError, match=f"training.optim: adam with .*{part}"):
        build_trainer(world, optim_args=arguments)


def test_arguments_reach_the_optimizer(world: World) -> None:
    trainer = build_trainer(world, optim="AdamW", optim_args={"weight_decay": 0.25, "betas": [0.5, 0.75]})
    assert trainer.optimizer.defaults["weight_decay"] == 0.25
    assert trainer.optimizer.defaults["betas"] == (0.5, 0.75)
    assert trainer.optimizer.defaults["lr"] == 0.001


@pytest.mark.parametrize("name", sorted({kind.value for kind in SchedulerType} - FOLLOW_A_METRIC))
def test_every_schedule_that_counts_steps_runs_to_the_end(world: World, name: str) -> None:
    warmup = 0 if name == "constant" else 1
    trainer = build_trainer(
        world,
        lr_scheduler_type=name,
        lr_scheduler_kwargs=FURTHER.get(name, {}),
        warmup_steps=warmup,
        max_steps=3,
        batch_size=10,
    )
    trainer.train()
    assert 0 <= trainer.scheduler.get_last_lr()[0] <= 0.001


@pytest.mark.parametrize("name", sorted(FOLLOW_A_METRIC))
def test_schedules_that_follow_a_metric_are_refused(world: World, name: str) -> None:
    with pytest.raises(UsageError, match=f"training.lr_scheduler_type: '{name}' follows a validation metric"):
        build_trainer(world, lr_scheduler_type=name)


@pytest.mark.parametrize(("wrong", "meant"), [("cosin", "cosine"), ("liner", "linear"), ("constant_with", "constant")])
def test_an_unknown_schedule_is_an_error_with_the_nearest(world: World, wrong: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"lr_scheduler_type: '{wrong}' .*did you mean '{meant}"):
        build_trainer(world, lr_scheduler_type=wrong)


def test_arguments_that_a_schedule_refuses_are_named(world: World) -> None:
    with pytest.raises(UsageError, match=r"lr_scheduler_kwargs: cosine_with_min_lr refused .*min_lr"):
        build_trainer(world, lr_scheduler_type="cosine_with_min_lr")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, r"5 would be ignored.* constant_with_warmup"),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"power": 2}}, r"'constant' takes no 'power'; it .*"),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, r"'constant_with_warmup' takes no 'num_cycles'; it takes none"),
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"lr_end": 0.1}}, r"'linear' takes no 'lr_end'; it"),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}},
            r"'cosine' takes no 'cycles'; did you mean 'num_cycles'\?",
        ),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_warmup_steps": 2}}, r"no 'num_warmup_steps'"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"last_epoch": 2}}, r"no 'last_epoch'"),
    ],
)
def test_a_setting_that_a_schedule_would_ignore_is_an_error(world: World, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=rf"training\.(warmup_steps|lr_scheduler_kwargs): .*{said}"):
        build_trainer(world, **settings)


@pytest.mark.parametrize("name", sorted({kind.value for kind in SchedulerType} - FOLLOW_A_METRIC - {"constant"}))
def test_every_other_schedule_warms_up(world: World, name: str) -> None:
    rates = []
    for warmup in (0, 2):
        trainer = build_trainer(
            world, lr_scheduler_type=name, lr_scheduler_kwargs=FURTHER.get(name, {}), warmup_steps=warmup, max_steps=8
        )
        rates.append(trainer.scheduler.get_last_lr()[0])
    assert rates[1] < rates[0]


def test_each_step_reports_the_learning_rate_that_it_took(world: World) -> None:
    trainer = build_trainer(
        world, lr_scheduler_type="linear", warmup_steps=2, max_steps=4, batch_size=10, learning_rate=0.01
    )
    rates = [trainer.train_step().learning_rate for _ in range(4)]
    assert rates == pytest.approx([0.0, 0.005, 0.01, 0.005])


def test_an_unknown_tracker_is_an_error_with_the_nearest(tmp_path: Any) -> None:
    with pytest.raises(UsageError, match=r"report_to: 'tensorbord' .*did you mean 'tensorboard'"):
        Trackers(["tensorbord"], {}, tmp_path)
