"""Evaluate a finished run, or any model, on fresh samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tiltlm.app.fit import stream
from tiltlm.app.load import load_run
from tiltlm.app.prompts import encode_prompts, other_prompts, read_prompts
from tiltlm.evaluation.evaluate import HELD_OUT, TRAINING, Evaluation, evaluate_model, evaluate_policy
from tiltlm.lm import LanguageModel
from tiltlm.runs.directory import RunDirectory


@dataclass(frozen=True)
class Draw:
    """How to draw fresh samples; ``prompts`` names a file or is one prompt, None: the default prompts."""

    samples: int
    seed: int
    prompts: str | None
    max_completion_length: int | None
    device: str
    progress: Callable[[int, int], None] | None = None


def evaluate_source(name: str, draw: Draw) -> Evaluation:
    """A model without a run: entropy and diversity. Raises ModelError, UsageError."""
    others = other_prompts(None, draw.prompts) if draw.prompts is not None else None
    model = LanguageModel.from_pretrained(name, device=draw.device)
    return evaluate_model(
        model,
        draw.samples,
        prompts=encode_prompts(model, others),
        seed=draw.seed,
        prompts_from=draw.prompts or "none",
        max_completion_length=draw.max_completion_length or 40,
        progress=draw.progress,
    )


def evaluate_run(run: RunDirectory, draw: Draw, top_p: float | None) -> Evaluation:
    """The tuned model of a run, on its held-out prompts if it has any. Raises CheckpointError, UsageError."""
    config, roles, target = load_run(run, draw.device)
    split = read_prompts(config)
    known = (split.held_out, HELD_OUT) if split.held_out is not None else (split.training, TRAINING)
    data, prompts_from = known if draw.prompts is None else (other_prompts(config, draw.prompts), draw.prompts)
    return evaluate_policy(
        roles,
        target,
        draw.samples,
        prompts=encode_prompts(roles.policy, data),
        max_completion_length=draw.max_completion_length or config.max_completion_length,
        # Other samples than those of the run's own evaluation and training.
        seed=stream(config.seed, "eval") + 1_000_000 * (draw.seed + 1),
        top_p=top_p,
        progress=draw.progress,
        prompts_from=prompts_from,
    )
