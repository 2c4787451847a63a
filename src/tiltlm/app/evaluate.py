"""`tiltlm eval`: measure the tuned model of a run, or any model, on fresh samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tiltlm.app.fit import stream
from tiltlm.app.load import load_run
from tiltlm.app.prompts import encode_prompts, other_prompts, read_prompts
from tiltlm.config.prompt_data import PromptData
from tiltlm.evaluation.evaluate import HELD_OUT, TRAINING, Evaluation, evaluate_model, evaluate_policy
from tiltlm.lm import LanguageModel
from tiltlm.runs.directory import RunDirectory


@dataclass(frozen=True)
class EvaluationRequest:
    """Which fresh samples to draw; ``prompts`` is a file or one prompt, None: the default prompts."""

    samples: int
    seed: int
    prompts: str | None
    max_completion_length: int | None
    device: str
    progress: Callable[[int, int], None] | None = None


def evaluate_source(name: str, request: EvaluationRequest) -> Evaluation:
    """Evaluate a model without a run: entropy and diversity. Raises ModelError, UsageError."""
    others = other_prompts(None, request.prompts) if request.prompts is not None else None
    model = LanguageModel.from_pretrained(name, device=request.device)
    return evaluate_model(
        model,
        request.samples,
        prompts=encode_prompts(model, others),
        seed=request.seed,
        prompts_from=request.prompts or "none",
        max_completion_length=request.max_completion_length or 40,
        progress=request.progress,
    )


def evaluate_run(run: RunDirectory, request: EvaluationRequest, top_p: float | None) -> Evaluation:
    """Evaluate the tuned model of a run, on its held-out prompts if it has any. Raises CheckpointError, UsageError."""
    config, roles, target = load_run(run, request.device)
    data: PromptData | None
    if request.prompts is not None:
        data, prompts_from = other_prompts(config, request.prompts), request.prompts
    else:
        split = read_prompts(config)
        data, prompts_from = (split.held_out, HELD_OUT) if split.held_out is not None else (split.training, TRAINING)
    return evaluate_policy(
        roles,
        target,
        request.samples,
        prompts=encode_prompts(roles.policy, data),
        max_completion_length=request.max_completion_length or config.max_completion_length,
        # Other samples than those of training and of the evaluation at the end of the run.
        seed=stream(config.seed, "eval_command") + 1_000_000 * (request.seed + 1),
        top_p=top_p,
        progress=request.progress,
        prompts_from=prompts_from,
    )
