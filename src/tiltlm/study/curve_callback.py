"""Measurements during a run of a study, on samples of the policy that are not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tiltlm import estimation
from tiltlm.app.fit import stream
from tiltlm.config.run import RunConfig
from tiltlm.config.study import CurveSection
from tiltlm.estimation import Estimate
from tiltlm.evaluation.evaluate import own_logprob, score_against_base
from tiltlm.evaluation.scores import kl_policy_base
from tiltlm.lm import LanguageModel, Roles
from tiltlm.rollouts import LocalRollouts
from tiltlm.runs import storage
from tiltlm.runs.directory import RunDirectory
from tiltlm.study.reference import RECORD, Reference, load_reference
from tiltlm.study.rows import curve_path, read_curve, reference_kl_path
from tiltlm.targets import Target, measure_samples
from tiltlm.training.callbacks import Callback
from tiltlm.training.metrics import StepMetrics
from tiltlm.training.progress import Progress


class CurveCallback(Callback):
    """Writes ``curve.jsonl`` into a run's directory: estimates of the policy at some steps, on fresh samples and the
    reference.

    Seeds depend on the step alone, so a run that was stopped and resumed writes the same lines.
    """

    def __init__(self, run: RunDirectory, reference_folder: Path, config: RunConfig, settings: CurveSection) -> None:
        self.run, self.reference_folder, self.config, self.settings = run, reference_folder, config, settings
        parts = settings.points + 1
        self.steps = {round(k * config.training.max_steps / parts) for k in range(1, parts)}
        self.roles: Roles | None = None
        self.target: Target | None = None
        self.reference: Reference | None = None

    def on_train_begin(self, progress: Progress, roles: Roles, target: Target) -> None:
        self.roles, self.target = roles, target
        kept = [line for line in read_curve(self.run) if line["step"] <= progress.step]
        storage.write_lines(curve_path(self.run), kept)

    def on_step_end(self, progress: Progress, metrics: StepMetrics) -> None:
        if progress.step in self.steps and progress.step < progress.max_steps:
            storage.append_line(curve_path(self.run), self.measure(progress))

    @torch.no_grad()
    def measure(self, progress: Progress) -> dict[str, Any]:
        """The line of ``curve.jsonl``."""
        assert self.roles is not None
        assert self.target is not None
        roles, target = self.roles, self.target
        with roles.use("policy") as policy:
            if self.reference is None:
                self.reference = load_reference(self.reference_folder, policy, self.config)
            prompts, seed = (
                self.reference.samples.prompts,
                stream(self.config.seed, "curve") + 1_000_000 * progress.step,
            )
            samples = LocalRollouts(policy).generate(
                prompts.select(prompts.fair_order(self.settings.samples, seed)),
                self.settings.samples,
                seed=seed,
                max_completion_length=self.config.max_completion_length,
            )
            kl = self.reference.kl_of(policy, self.settings.reference)
        scores, tokens = score_against_base(roles, samples), samples.completion_ids
        columns = measure_samples(target.features, samples).unbind(-1)
        moments = {f.name: estimation.mean(column) for f, column in zip(target.features, columns, strict=True)}
        figures: dict[str, Estimate] = {
            "kl_p_pi": kl,
            "kl_pi_a": kl_policy_base(scores),
            "distinct_1": estimation.distinct_1(tokens),
            "self_bleu_5": estimation.self_bleu_5(tokens),
            "entropy": estimation.entropy(own_logprob(samples, scores)),
            "perplexity_base": estimation.perplexity(scores.base_logprob, samples.lengths.cpu()),
        }
        counts = {"step": progress.step, "sequences": progress.sequences, "forward_passes": progress.forward_passes}
        return {**counts, "samples": len(samples), "moments": moments, "figures": figures}


def is_measured(run: RunDirectory, reference_folder: Path) -> bool:
    """Whether KL(p‖π) of a finished run is known on the present reference."""
    path = reference_kl_path(run)
    key = storage.read_object(reference_folder / RECORD)["key"]
    return path.exists() and storage.read_object(path)["reference"] == key


def measure_end(
    run: RunDirectory, policy: LanguageModel, reference_folder: Path, config: RunConfig, scored: int
) -> None:
    """Write KL(p‖π) of a tuned model, by ``scored`` samples of the frozen reference, and KL(p‖a) beside it."""
    reference = load_reference(reference_folder, policy, config)
    key = storage.read_object(reference_folder / RECORD)["key"]
    divergences = {"kl_p_pi": reference.kl_of(policy, scored), "kl_p_a": reference.kl_p_a}
    storage.write_object(reference_kl_path(run), {"reference": key, **divergences})
