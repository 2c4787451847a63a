"""The trainer's state: everything that the next step depends on, as a checkpoint holds it."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from tiltlm.objectives import AdaptiveObjective, Objective
from tiltlm.training.pass_counter import Passes

if TYPE_CHECKING:
    from tiltlm.training.trainer import Trainer


def pack(trainer: Trainer) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors and the numbers of a checkpoint."""
    scaler = trainer.accelerator.scaler
    pool, reuse = trainer.reuse.state()
    tensors = {
        "policy": {name: p.detach() for name, p in trainer.parameters.items()},
        "proposal": trainer.roles.proposal_state(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.scheduler.state_dict(),
        "scaler": scaler.state_dict() if scaler is not None else None,
        "generator": trainer.drawer.generator_state,
        "pool": pool,
        "leaning": trainer.guidance.leaning if trainer.guidance else None,
        "balance": trainer.scorer.balance.moments,
    }
    numbers = {
        "partition": trainer.partition.to_json(),
        "queue": trainer.drawer.queue.position,
        "drawn": trainer.drawer.drawn,
        "source": trainer.source,
        "reuse": reuse,
        "step": trainer.step,
        "passes": asdict(trainer.passes),
        "moving": _moving(trainer.scorer.objective),
        "seconds": trainer.spent,
    }
    return tensors, numbers


def unpack(trainer: Trainer, tensors: dict[str, Any], numbers: dict[str, Any]) -> None:
    """Put back what ``pack`` gave; raises KeyError, ValueError or RuntimeError where it does not fit the trainer."""
    with torch.no_grad():
        for name, parameter in trainer.parameters.items():
            parameter.copy_(tensors["policy"][name])
    if tensors["proposal"] is not None:
        trainer.roles.load_proposal_state(tensors["proposal"])
    trainer.optimizer.load_state_dict(tensors["optimizer"])
    trainer.scheduler.load_state_dict(tensors["scheduler"])
    if trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.load_state_dict(tensors["scaler"])
    trainer.drawer.restore(tensors["generator"], numbers["queue"], numbers["drawn"])
    trainer.reuse.restore(tensors["pool"], numbers["reuse"])
    if trainer.guidance:
        trainer.guidance.lean(tensors["leaning"])
        trainer.keep_guide()
    trainer.scorer.balance.moments = tensors["balance"]
    trainer.partition = type(trainer.partition).from_json(numbers["partition"])
    trainer.step, trainer.source, trainer.spent = numbers["step"], numbers["source"], numbers["seconds"]
    if numbers["moving"] is not None:
        adaptive: Any = trainer.scorer.objective
        trainer.scorer.objective = replace(adaptive, **{adaptive.moving: numbers["moving"]})
    vars(trainer.passes).update(vars(Passes(**numbers["passes"])))


def _moving(objective: Objective) -> float | None:
    """What has moved in the objective, as a price on KL; None where nothing does."""
    return getattr(objective, objective.moving) if isinstance(objective, AdaptiveObjective) else None
