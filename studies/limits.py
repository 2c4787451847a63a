"""Baselines for a method's KL(p‖π): the guide alone, maximum likelihood on texts of p, and distillation of the guide.

python studies/limits.py studies/embedded.yaml docs/results/embedded --tasks politics science
python studies/limits.py studies/embedded.yaml docs/results/embedded --tasks politics --likelihood 2000
python studies/limits.py studies/embedded.yaml docs/results/embedded --tasks politics --distilled 8192
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tiltlm.app.build import build_base, build_terms
from tiltlm.config.run import RunConfig, parse_config
from tiltlm.config.study import load_study
from tiltlm.estimation import Estimate
from tiltlm.guides import guide_toward
from tiltlm.lm import Guide, LanguageModel, SamplingSettings, next_token
from tiltlm.study.reference import Reference, load_reference
from tiltlm.targets import fit_target
from tiltlm.training.checkpoint import load_base_sample

# The first texts of the reference measure KL(p‖π); training on texts of the reference uses the others.
HELD_OUT = 1536


@dataclass(frozen=True)
class Task:
    """A task of a study: its base, and its frozen sample of p."""

    config: RunConfig
    folder: Path
    reference: Reference

    @staticmethod
    def of(study_file: str, results: Path, name: str) -> Task:
        """The task of this name; its reference is in the folder of results."""
        study = load_study(study_file)
        config = parse_config({**study.shared, "target": study.tasks[name].target})
        folder = results / "references" / name
        return Task(config, folder, load_reference(folder, build_base(config).freeze(), config))

    def policy(self) -> LanguageModel:
        """The base with the study's adapter."""
        return build_base(self.config).with_lora(seed=self.config.seed, **(self.config.peft or {}))

    def guide(self, base: LanguageModel) -> Guide:
        """The guide estimated from the fit samples."""
        sample = load_base_sample(self.folder, base)
        assert sample is not None
        return base.placed(guide_toward(base, fit_target(build_terms(self.config), sample), sample))

    @torch.no_grad()
    def kl(self, model: LanguageModel, texts: int, guide: Guide | None = None) -> Estimate:
        """KL(p‖model) on the reference's first texts."""
        samples = replace(self.reference.samples.select(torch.arange(texts)), guide=guide, settings=SamplingSettings())
        return self.reference.kl(model.logprob(samples).double().sum(-1).cpu())

    def steps(self, policy: LanguageModel, updates: int) -> Iterator[torch.optim.Optimizer]:
        """Yields Adam once per update and steps it afterwards; the rate rises for five updates, then falls to 0."""
        rate = self.config.training.learning_rate
        optimizer = torch.optim.Adam([p for p in policy.model.parameters() if p.requires_grad], rate)
        for done in range(updates):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (done + 1) / 5) * (1 - done / updates)
            optimizer.zero_grad()
            yield optimizer
            optimizer.step()


def of_guide(task: Task) -> str:
    """KL(p‖g) of the guide estimated from the fit samples, and its number of states."""
    base = build_base(task.config).freeze()
    guide = task.guide(base)
    kl = task.kl(base, min(4096, len(task.reference)), guide)
    return f"KL(p‖a) {task.reference.kl_p_a}, KL(p‖g) {kl}, a guide of {len(guide.transitions):,} states"


def of_likelihood(task: Task, count: int, epochs: int) -> Iterator[str]:
    """KL(p‖π) after each epoch of maximum likelihood on ``count`` texts, drawn from the reference by weight."""
    generator = torch.Generator().manual_seed(task.config.seed)
    weights, size = task.reference.weights[HELD_OUT:], task.config.training.batch_size
    places = (torch.arange(count) + torch.rand(1, generator=generator)) / count
    found = torch.searchsorted((weights / weights.sum()).cumsum(0), places.double())
    texts = found.clamp_max(len(weights) - 1) + HELD_OUT
    yield f"{len(texts.unique()):,} different texts of {count:,}"  # type: ignore[no-untyped-call]
    policy, each = task.policy(), count // size
    order = torch.empty(0, dtype=torch.long)
    for update, _ in enumerate(task.steps(policy, epochs * each)):
        if update % each == 0:
            order = texts[torch.randperm(count, generator=generator)]
        batch = task.reference.samples.select(order[update % each * size :][:size])
        (-policy.logprob(batch, settings=SamplingSettings()).sum(-1).mean()).backward()  # type: ignore[no-untyped-call]
        if update % each == each - 1:
            yield f"epoch {update // each + 1}: {task.kl(policy, HELD_OUT)}"


def of_distillation(task: Task, texts: int, updates: int) -> Iterator[str]:
    """KL(p‖π) during distillation of the guide at every token of ``texts`` samples of the guide."""
    base, policy = build_base(task.config).freeze(), task.policy()
    guide, size = task.guide(base), task.config.training.batch_size
    generator = torch.Generator().manual_seed(task.config.seed)
    drawn = base.sample(texts, task.reference.samples.prompts, 77, max_completion_length=40, guide=guide)
    drawn = replace(drawn, guide=None)
    for update, _ in enumerate(task.steps(policy, updates)):
        batch = drawn.select(torch.randperm(len(drawn), generator=generator)[:size])
        for rows in policy.chunks(batch):
            chunk = batch.select(rows).trimmed()
            with torch.no_grad():
                base_hidden = base.read(chunk)
            loss = next_token(chunk, policy.read(chunk), base_hidden, guide).taught
            assert loss is not None
            (-loss.sum() / size).backward()  # type: ignore[no-untyped-call]
        if update % 20 == 19:
            yield f"{update + 1} updates: {task.kl(policy, HELD_OUT)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study")
    parser.add_argument("results", type=Path, help="the study's folder, with its references")
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--likelihood", type=int, metavar="TEXTS", help="maximum likelihood on this many texts of p")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--distilled", type=int, metavar="TEXTS", help="distil the guide on this many texts of it")
    parser.add_argument("--updates", type=int, default=100)
    asked = parser.parse_args()
    for name in asked.tasks or load_study(asked.study).tasks:
        task = Task.of(asked.study, asked.results, name)
        lines: Iterator[str]
        if asked.likelihood:
            lines = of_likelihood(task, asked.likelihood, asked.epochs)
        elif asked.distilled:
            lines = of_distillation(task, asked.distilled, asked.updates)
        else:
            lines = iter([of_guide(task)])
        for line in lines:
            print(f"{name}: {line}", flush=True)


if __name__ == "__main__":
    main()
