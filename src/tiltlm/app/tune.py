"""The main job: fit a target, tune a model toward it, evaluate both, write the run directory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from tiltlm.app.build import build_base, build_roles
from tiltlm.app.display import Display, plain_console
from tiltlm.app.finish import evaluate_both, write_result
from tiltlm.app.fit import RunTarget, fit_run_target, goals, stream
from tiltlm.app.method import build_method, check_expressible, method_notes
from tiltlm.app.plan import RunPlan, plan_run
from tiltlm.app.prompts import encode_prompts, read_prompts
from tiltlm.app.python_target import prompts_section, target_section
from tiltlm.config.run import RunConfig, parse_config
from tiltlm.evaluation.evaluate import Evaluation
from tiltlm.features import run_file_form
from tiltlm.lm import LanguageModel, Prompts, Roles
from tiltlm.reports.report import write_report
from tiltlm.runs.directory import RunDirectory
from tiltlm.runs.resuming import check_same_base, check_same_config, is_done
from tiltlm.targets import FitReport, FittedTarget
from tiltlm.training.acceleration import Trackers, build_accelerator
from tiltlm.training.callbacks import Callback
from tiltlm.training.checkpoint import save_base_sample
from tiltlm.training.interrupt import sigterm_interrupts
from tiltlm.training.metrics import StepMetrics
from tiltlm.training.progress import Progress
from tiltlm.training.trainer import Trainer

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Run:
    """The result of a run: its directory, both models, and both evaluations (None if interrupted)."""

    directory: RunDirectory
    status: Literal["done", "interrupted"]
    roles: Roles
    report: FitReport
    base_evaluation: Evaluation | None
    evaluation: Evaluation | None

    @property
    def policy(self) -> LanguageModel:
        """The tuned model."""
        return self.roles.policy


class Recorder(Callback):
    """Writes every step into the run directory."""

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory

    def on_step_end(self, progress: Progress, metrics: StepMetrics) -> None:
        self.directory.append_metrics(metrics.to_json())

    def on_save(self, progress: Progress, checkpoint: Path) -> None:
        self.directory.write_run(progress=progress.to_json(), seconds=progress.seconds)


def tune(
    base: LanguageModel,
    target: FittedTarget,
    *,
    output_dir: str | os.PathLike[str],
    method: str | Mapping[str, Any] = "kept_guide",
    proposal: str | None = None,
    peft: dict[str, Any] | None = None,
    seed: int = 0,
    evaluation_samples: int = 2048,
    held_out: Sequence[Any] | None = None,
    callbacks: Sequence[Callback] = (),
    **training: Any,
) -> Run:
    """Tune a copy of ``base`` toward ``target``, and write the run to ``output_dir``.

    ``method`` is a name, or a mapping as in the run file, such as ``{"name": "guided", "args": {"correction": 0}}``.
    ``training`` are fields of ``TrainingArguments``. The run is evaluated on the prompts of the target or, if given, on
    ``held_out``: texts, chat messages, or mappings with one of these as ``prompt`` and further columns. With ``peft``
    (LoRA settings) the weights of ``base`` are shared, not copied, and ``base`` has the adapter afterwards. Raises
    UsageError for wrong settings, RunExistsError if ``output_dir`` is in use.
    """
    config = parse_config(
        {
            "model": base.name,
            "dtype": "auto" if base.compute_dtype else str(base.model.dtype).removeprefix("torch."),
            "prompts": prompts_section(target.base_sample.samples.prompts, held_out),
            "target": target_section(target),
            "method": {"proposal": proposal, **({"name": method} if isinstance(method, str) else method)},
            "training": training,
            "peft": peft,
            "seed": seed,
            "evaluation": {"samples": evaluation_samples},
            "max_completion_length": target.base_sample.max_completion_length,
        }
    )
    directory = RunDirectory(Path(output_dir))
    directory.check_free()
    plan = RunPlan(config, build_method(config.method), target.terms, None, read_prompts(config))
    check_expressible(plan.method.objective, target)
    roles = build_roles(config, base)
    fitted = RunTarget(target, target.base_sample, target.report)
    display = Display(plain_console(), goals(fitted.report))
    for term in target.terms:
        if run_file_form(term.feature) is None:
            display.say(
                f"note: no run file can name the feature '{term.feature.name}', so `tiltlm eval` cannot load it; "
                f"define its function in a module"
            )
    with sigterm_interrupts():
        accelerator = build_accelerator(config.training, base.device)
        return TuneJob(plan, directory, roles, fitted, display, accelerator, tuple(callbacks)).run(resume=False)


def finished(config: RunConfig, output_dir: Path) -> RunDirectory | None:
    """The run in ``output_dir`` if it is done, else None. Raises UsageError if it is done with another config."""
    directory = RunDirectory(output_dir)
    if not directory.run_path.exists() or not is_done(directory):
        return None
    check_same_config(directory, config.to_json(), config.non_defaults(), done=True)
    if not directory.report_path.exists():
        write_report(directory)
    return directory


def tune_config(
    config: RunConfig,
    output_dir: Path,
    *,
    resume: bool = False,
    console: Console | None = None,
    callbacks: Sequence[Callback] = (),
    fit_dir: Path | None = None,
) -> Run:
    """The job of ``tiltlm tune``; with ``resume`` it continues the run in ``output_dir`` bit for bit.

    ``callbacks`` are added to those of the config. ``fit_dir`` is a folder with samples of the fit that were drawn
    earlier with the same settings and seed; they are not drawn again, but count as drawn.

    Call ``finished`` first: a run that is done would be evaluated and written again. Raises KeyboardInterrupt on Ctrl-C
    and SIGTERM outside the training loop, after marking the run as interrupted.
    """
    display = Display(console or plain_console())
    plan = plan_run(config)
    directory = RunDirectory(output_dir)
    resume = resume and directory.run_path.exists()
    if resume:
        began = RunDirectory.open(output_dir)
        check_same_config(began, config.to_json(), config.non_defaults(), done=is_done(began))
    else:
        directory.check_free()
    with sigterm_interrupts():
        base = build_base(config)
        # Before the first sample: an impossible precision or LoRA setting shows here.
        accelerator = build_accelerator(config.training, base.device)
        roles = build_roles(config, base)
        if not roles.shared:
            base.freeze()  # nothing else uses it
        try:
            with roles.use("base") as model:
                fitted = fit_run_target(plan, model, display, directory.checkpoint_dir if resume else fit_dir)
        except KeyboardInterrupt:
            if not resume:
                RunDirectory.create(output_dir, config.to_json(), config.seed)
            directory.mark_interrupted()
            raise
        display.goals = goals(fitted.report)
        for warning in fitted.report.warnings:
            display.say(f"note: {warning}")
        callbacks = (*plan.callbacks, *callbacks)
        return TuneJob(plan, directory, roles, fitted, display, accelerator, callbacks).run(resume=resume)


@dataclass(frozen=True)
class TuneJob:
    """The rest of a run once its target is fitted: training, evaluation, the tuned model and the report."""

    plan: RunPlan
    directory: RunDirectory
    roles: Roles
    target: RunTarget
    display: Display
    accelerator: Accelerator
    callbacks: tuple[Callback, ...] = ()

    def run(self, *, resume: bool) -> Run:
        """Do the job; with ``resume`` from the latest checkpoint."""
        config, method, target = self.plan.config, self.plan.method, self.target.target
        for note in method_notes(method.objective, target):
            self.display.say(f"note: {note}")
        trainer = self._trainer()
        with self.roles.use("base") as base:
            weights = base.fingerprint()
            held_out = self._held_out(base)
        self._open_directory(trainer, weights, resume=resume)
        trackers = None
        try:
            if not resume:
                save_base_sample(self.directory.checkpoint_dir, self.target.base_sample)
            if config.report_to:
                trackers = Trackers(config.report_to, config.to_json(), self.directory.path)
                trainer.add_callback(trackers)
            device, report = str(self.roles.policy.device), self.target.report.to_json()
            self.directory.write_run(base_fingerprint=weights, device=device, target=report)
            run = self._train_and_finish(trainer, held_out)
        except KeyboardInterrupt:
            self.directory.mark_interrupted()
            raise
        except BaseException as error:
            self.directory.mark_failed(error)
            raise
        finally:
            if trackers:
                trackers.close()
        if run.status == "done":
            write_report(self.directory)
        return run

    def _trainer(self) -> Trainer:
        config = self.plan.config
        trainer = Trainer(
            self.roles,
            self.target.target,
            self.plan.method,
            config.training,
            base_sample=self.target.base_sample,
            seed=stream(config.seed, "train"),
            accelerator=self.accelerator,
        )
        trainer.checkpoint_dir = self.directory.checkpoint_dir
        for callback in (Recorder(self.directory), self.display, *self.callbacks):
            trainer.add_callback(callback)
        return trainer

    def _held_out(self, base: LanguageModel) -> Prompts | None:
        """The held-out prompts, if any. Raises UsageError, before training, if one is too long."""
        data = self.plan.prompts.held_out
        if data is None:
            return None
        prompts = encode_prompts(base, data)
        base.check_length(prompts, self.plan.config.max_completion_length)
        return prompts

    def _open_directory(self, trainer: Trainer, weights: str, *, resume: bool) -> None:
        """Create the run directory or, with ``resume``, load the trainer from it. Raises CheckpointError."""
        if not resume:
            config = self.plan.config
            RunDirectory.create(self.directory.path, config.to_json(), config.seed)
            return
        check_same_base(self.directory, weights)
        trainer.resume()
        self.directory.truncate_metrics(trainer.step)
        self.directory.mark_running()

    def _train_and_finish(self, trainer: Trainer, held_out: Prompts | None) -> Run:
        """Do the remaining steps, evaluate both models, and write the tuned model."""
        config, target, directory = self.plan.config, self.target, self.directory
        for callback in trainer.callbacks:
            callback.on_train_begin(trainer.progress, self.roles, target.target)
        began, every = trainer.step, config.training.save_steps
        with self.display.training(began, config.training.max_steps):
            outcome = trainer.train()
        final = {"progress": outcome.progress.to_json(), "seconds": outcome.progress.seconds}
        if outcome.status == "interrupted":
            directory.mark_interrupted(**final)
            return Run(directory, "interrupted", self.roles, target.report, None, None)
        if trainer.step > began and not (every and trainer.step % every == 0):
            trainer.save()  # so that no step is repeated if the evaluation is interrupted
        seed = stream(config.seed, "evaluate")
        before, after = evaluate_both(
            config, self.roles, target.target, target.base_sample, held_out, seed, self.display
        )
        write_result(directory, config, self.roles, target.report, before, after)
        directory.mark_done(evaluation={"base": before.to_json(), "policy": after.to_json()}, **final)
        return Run(directory, "done", self.roles, target.report, before, after)
