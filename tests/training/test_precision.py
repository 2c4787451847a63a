"""Mixed precision: what it computes in, what it refuses, that two runs do not share it, and loss scaling."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tiltlm.config.training import TrainingArguments
from tiltlm.errors import NumericalError, UsageError
from tiltlm.lm import LanguageModel
from tiltlm.objectives import Objective, Record
from tiltlm.training.acceleration import build_accelerator
from tiltlm.training.trainer import Trainer
from tiny_world import World, build_trainer

CPU = torch.device("cpu")


def single(world: World) -> LanguageModel:
    """A copy of the base in float32."""
    policy = world.base.copy()
    policy.model.float()
    return policy


def computed_in(trainer: Trainer) -> torch.dtype:
    """Takes a step and says what the policy's logits were."""
    assert trainer.roles.policy.output_layer is not None  # found out once, by a call of the layer
    seen: list[torch.dtype] = []
    handle = trainer.roles.policy.model.lm_head.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    trainer.train_step()
    handle.remove()
    assert len(set(seen)) == 1
    return seen[0]


def test_fp16_on_a_cpu_is_a_usage_error(world: World) -> None:
    with pytest.raises(UsageError, match=r"training.fp16: not possible on cpu"):
        build_trainer(world, fp16=True)
    # And it leaves nothing behind that the next run in this process would stumble over.
    assert build_trainer(world).accelerator.mixed_precision == "no"


def test_two_precisions_at_once_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"training.bf16, training.fp16: choose one"):
        build_accelerator(TrainingArguments(bf16=True, fp16=True), CPU)


def test_bf16_computes_in_bfloat16_keeps_weights_and_ends_with_its_run(world: World) -> None:
    half = build_trainer(world, policy=single(world), bf16=True, batch_size=30)
    assert computed_in(half) == torch.bfloat16
    assert {p.dtype for p in half.parameters.values()} == {torch.float32}
    assert computed_in(build_trainer(world, batch_size=30)) == torch.float64


def test_gradients_in_bf16_point_where_those_in_full_precision_do(world: World) -> None:
    vectors = []
    for bf16 in (False, True):
        trainer = build_trainer(world, policy=single(world), bf16=bf16, batch_size=400)
        trainer.accumulate(trainer.draw(), world.truth.log_z)
        vectors.append(torch.cat([p.grad.flatten() for p in trainer.parameters.values() if p.grad is not None]))
    cosine = torch.nn.functional.cosine_similarity(*(v[None].double() for v in vectors))
    assert float(cosine) > 0.9


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in trainer.parameters.values()])


@pytest.mark.parametrize("younger", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("older", ["no", "bf16"])
def test_two_live_trainers_keep_their_own_precision(world: World, older: str, younger: str) -> None:
    """Also where the younger one is refused, as fp16 is on a CPU."""

    def build(precision: str) -> Trainer:
        return build_trainer(
            world, policy=single(world), batch_size=20, **{precision: True} if precision != "no" else {}
        )

    dtypes = {"no": torch.float32, "bf16": torch.bfloat16}
    alone = build(older)
    alone.train_step()
    alone.train_step()
    first = build(older)
    first.train_step()
    if younger == "fp16":
        with pytest.raises(UsageError, match=r"training\.fp16"):
            build(younger)
    else:
        assert computed_in(build(younger)) == dtypes[younger]
    assert computed_in(first) == dtypes[older]
    assert first.accelerator.mixed_precision == older
    assert torch.equal(weights(first), weights(alone))


SCALE = 1024.0


@pytest.fixture
def fp16_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerate sets up on a GPU, which it refuses on a CPU though torch can do it there: autocast and scaler."""

    def build(args: TrainingArguments, device: torch.device) -> Any:
        accelerator = build_accelerator(replace(args, fp16=False), device)
        if args.fp16:
            accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=2)
            accelerator.autocast = partial(torch.autocast, "cpu", dtype=torch.float16)
        return accelerator

    monkeypatch.setattr("tiltlm.training.trainer.build_accelerator", build)


def fp16(world: World, **settings: Any) -> Trainer:
    return build_trainer(world, policy=single(world), **{"fp16": True, "batch_size": 30, **settings})


@pytest.mark.usefixtures("fp16_on_a_cpu")
def test_loss_scaling_leaves_no_trace_in_what_is_reported_and_learned(world: World) -> None:
    """One step in float16 beside the same in float32: norm and change are alike, not a thousand times as large."""
    results = []
    for precision in (False, True):
        trainer = fp16(world, fp16=precision, batch_size=400, optim="sgd", max_grad_norm=0.0)
        assert (trainer.accelerator.scaler is not None) is precision
        before = weights(trainer)
        metrics = trainer.train_step()
        results.append((metrics.grad_norm, weights(trainer) - before))
    (norm, change), (half_norm, half_change) = results
    assert half_norm == pytest.approx(norm, rel=0.2)
    assert float(half_change.norm()) == pytest.approx(float(change.norm()), rel=0.2)
    assert float(torch.nn.functional.cosine_similarity(change, half_change, dim=0)) > 0.9


@pytest.mark.usefixtures("fp16_on_a_cpu")
def test_a_step_that_overflows_is_skipped_and_the_scale_halved(world: World) -> None:
    trainer = fp16(world, lr_scheduler_type="linear")
    assert computed_in(trainer) == torch.float16
    before, rate = weights(trainer), trainer.scheduler.get_last_lr()
    trainer.accelerator.scaler._scale.fill_(1e38)
    metrics = trainer.train_step()
    assert not math.isfinite(metrics.grad_norm)
    assert torch.equal(weights(trainer), before)
    assert trainer.scheduler.get_last_lr() == rate
    assert trainer.accelerator.scaler.get_scale() == pytest.approx(5e37, rel=1e-3)
    trainer.accelerator.scaler._scale.fill_(SCALE)
    trainer.train_step()
    assert not torch.equal(weights(trainer), before)
    assert trainer.scheduler.get_last_lr() < rate


@pytest.mark.usefixtures("fp16_on_a_cpu")
def test_a_resumed_run_goes_on_with_its_scale(world: World, tmp_path: Path) -> None:
    whole = fp16(world)
    for _ in range(5):
        whole.train_step()
    first = fp16(world, folder=tmp_path)
    for _ in range(3):
        first.train_step()
    first.save()
    second = fp16(world, folder=tmp_path)
    assert second.resume()
    assert second.accelerator.scaler.get_scale() == 2 * SCALE
    for _ in range(2):
        second.train_step()
    assert second.accelerator.scaler.state_dict() == whole.accelerator.scaler.state_dict()
    assert torch.equal(weights(second), weights(whole))


class Overwhelming(Objective):
    """Coefficients that float32 holds and whose gradients it does not."""

    name = "overwhelming"

    def coefficients(self, record: Record) -> torch.Tensor:
        return torch.full_like(record.policy_logprob, 1e38)


@pytest.mark.usefixtures("fp16_on_a_cpu")
def test_a_run_in_which_no_scale_helps_fails_and_does_not_skip_every_step(
    world: World,
) -> None:
    trainer = fp16(world)
    trainer.scorer.objective = Overwhelming()
    for _ in range(int(math.log2(SCALE)) + 1):
        trainer.train_step()
    with pytest.raises(NumericalError, match=r"gradient is not finite; lower training\.learning_rate"):
        trainer.train_step()
