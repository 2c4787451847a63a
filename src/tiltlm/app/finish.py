"""The end of a run: evaluate both models, and write the texts and the tuned model."""

from __future__ import annotations

import os
import shutil

from safetensors import SafetensorError

from tiltlm.app.display import Display
from tiltlm.config.run import RunConfig
from tiltlm.errors import TiltError
from tiltlm.evaluation.evaluate import (
    HELD_OUT,
    TRAINING,
    Evaluation,
    draw_control,
    evaluate_base,
    evaluate_policy,
)
from tiltlm.lm import Prompts, Roles
from tiltlm.reports.model_card import model_card
from tiltlm.runs.directory import RunDirectory
from tiltlm.targets import BaseSample, FitReport, Target


def evaluate_both(
    config: RunConfig,
    roles: Roles,
    target: Target,
    base_sample: BaseSample,
    held_out: Prompts | None,
    seed: int,
    display: Display,
) -> tuple[Evaluation, Evaluation]:
    """Evaluate the base on the samples of the fit, and the tuned model on fresh samples.

    With ``held_out`` prompts both are evaluated on fresh samples of these.
    """
    wanted, length, control = config.evaluation, base_sample.max_completion_length, None
    if held_out is not None:
        with display.counting("evaluating the base") as progress:
            control = draw_control(
                roles, target, wanted.samples, held_out, max_completion_length=length, seed=seed, progress=progress
            )
    prompts_from = HELD_OUT if held_out is not None else TRAINING
    before = evaluate_base(
        control or base_sample.of_the_base(), target, wanted.samples, wanted.texts, seed, prompts_from=prompts_from
    )
    with display.counting("evaluating the tuned model") as progress:
        after = evaluate_policy(
            roles,
            target,
            wanted.samples,
            prompts=base_sample.samples.prompts if held_out is None else held_out,
            max_completion_length=length,
            seed=seed,
            top_p=wanted.top_p,
            texts=wanted.texts,
            progress=progress,
            control=control,
            prompts_from=prompts_from,
        )
    display.note_mismatch(after.mismatch)
    return before, after


def write_result(
    directory: RunDirectory, config: RunConfig, roles: Roles, report: FitReport, before: Evaluation, after: Evaluation
) -> None:
    """Write the texts, and the tuned model whole or not at all. Raises TiltError on a full disk."""
    directory.write_samples([*before.texts, *after.texts])
    partial = directory.path / "policy.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        roles.policy.save_pretrained(partial)
        keeps = roles.policy.guide is not None
        card = model_card(config.model, config.to_json(), report.to_json(), after.to_json(), keeps_guide=keeps)
        (partial / "README.md").write_text(card, "utf-8")
        shutil.rmtree(directory.policy_dir, ignore_errors=True)
        os.replace(partial, directory.policy_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise TiltError(
            f"the tuned model could not be written to {directory.policy_dir}: {error}. "
            f"Free some space and go on with --resume; the checkpoints are safe."
        ) from error
