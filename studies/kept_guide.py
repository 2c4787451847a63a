"""A policy that keeps its guide, π ∝ LoRA · ψ, and so begins at KL(p‖g); or one that is taught the guide's law.

python studies/kept_guide.py studies/embedded.yaml docs/results/embedded --tasks politics
python studies/kept_guide.py studies/embedded.yaml docs/results/embedded --tasks politics --taught 8192
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from tiltlm.build import build_base, build_terms
from tiltlm.config import RunConfig, parse_config
from tiltlm.estimation import Estimate
from tiltlm.lm import Guide, LanguageModel, Law, Samples, next_token
from tiltlm.study.file import load_study
from tiltlm.study.reference import Reference, load_reference
from tiltlm.targets import FittedTarget, fit_target, measure_samples
from tiltlm.targets.twist import Twist
from tiltlm.training.checkpoint import load_base_sample

SCORED = 1024


def kl(policy: LanguageModel, reference: Reference, guide: Guide | None) -> Estimate:
    """KL(p‖π) on the reference's first texts."""
    samples = replace(reference.samples.select(torch.arange(SCORED)), guide=guide, law=Law())
    with torch.no_grad():
        return reference.kl(policy.logprob(samples).double().sum(-1).cpu())


def steps(policy: LanguageModel, rate: float, updates: int) -> Iterator[torch.optim.Optimizer]:
    """An Adam for each update, its rate rising for five and then falling to 0; it steps when the next is asked for."""
    optimizer = torch.optim.Adam([p for p in policy.model.parameters() if p.requires_grad], rate)
    for done in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (done + 1) / 5) * (1 - done / updates)
        optimizer.zero_grad()
        yield optimizer
        optimizer.step()


def kept(
    policy: LanguageModel, base: LanguageModel, target: FittedTarget, guide: Guide, config: RunConfig
) -> Iterator[int]:
    """GDC++ on the fit's samples and then on the policy's own; the sequences drawn after every eighth update."""
    first, size = target.base_sample, config.training.batch_size
    order = torch.randperm(len(first.samples), generator=torch.Generator().manual_seed(config.seed)).split(size)
    for update, optimizer in enumerate(steps(policy, config.training.learning_rate, len(order) + 24)):
        del optimizer
        if update < len(order):
            part = first.select(order[update])
            samples, values, log_ratio = part.samples, part.features, part.log_ratio
        else:
            drawn = policy.sample(size, first.samples.prompts, update, max_completion_length=40, guide=guide)
            samples, values = drawn, measure_samples(target.features, drawn)
            with torch.no_grad():
                log_ratio = (base.logprob(drawn, law=Law()).double() - drawn.proposal_logprob.double()).sum(-1)
        proposal = samples.sequence_logprob.double()
        score = target.log_score(proposal + log_ratio, values) - target.report.log_z.value
        samples = replace(samples, guide=guide, law=Law())
        for rows in policy.chunks(samples):
            logprob = policy.logprob(samples.select(rows)).sum(-1)
            pull = (score[rows] - proposal[rows]).exp() - (logprob.detach().double() - proposal[rows]).exp()
            (-(pull.float() * logprob).sum() / size).backward()  # type: ignore[no-untyped-call]
        if update % 8 == 7:
            yield len(first.samples) + max(0, update + 1 - len(order)) * size


def taught(
    policy: LanguageModel, base: LanguageModel, samples: Samples, guide: Guide, config: RunConfig, updates: int
) -> Iterator[int]:
    """The guide's law as a teacher at every token of its own ``samples``; the updates so far, every twentieth."""
    size, generator = config.training.batch_size, torch.Generator().manual_seed(config.seed)
    for update, optimizer in enumerate(steps(policy, config.training.learning_rate, updates)):
        del optimizer
        batch = samples.select(torch.randperm(len(samples), generator=generator)[:size])
        for rows in policy.chunks(batch):
            chunk = batch.select(rows).trimmed()
            with torch.no_grad():
                reading = base.read(chunk)
            found = next_token(chunk, policy.read(chunk), reading, guide).taught
            assert found is not None
            (-found.sum() / size).backward()  # type: ignore[no-untyped-call]
        if update % 20 == 19:
            yield update + 1


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study")
    parser.add_argument("results", type=Path, help="the study's folder, with its references")
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--taught", type=int, metavar="TEXTS", help="teach the law of the guide on so many texts of it")
    parser.add_argument("--updates", type=int, default=100)
    asked = parser.parse_args()
    study = load_study(asked.study)
    for name in asked.tasks:
        config = parse_config({**study.shared, "target": study.tasks[name].target})
        folder, base = asked.results / "references" / name, build_base(config).freeze()
        policy = build_base(config).with_lora(seed=config.seed, **(config.peft or {}))
        sample, reference = load_base_sample(folder, base), load_reference(folder, base, config)
        assert sample is not None
        target = fit_target(build_terms(config), sample)
        guide = base.placed(Twist.of(base, target, sample).toward(target, sample))
        print(f"{name}: KL(p‖g) {kl(base, reference, guide)}", flush=True)
        if not asked.taught:
            for drawn in kept(policy, base, target, guide, config):
                print(f"{name}: {drawn:,} sequences, KL(p‖π) {kl(policy, reference, guide)}", flush=True)
            continue
        texts = base.sample(asked.taught, sample.samples.prompts, 77, max_completion_length=40, guide=guide)
        texts = replace(texts, guide=None)
        for updates in taught(policy, base, texts, guide, config, asked.updates):
            print(f"{name}: {updates} updates, KL(p‖π) {kl(policy, reference, None)}", flush=True)


if __name__ == "__main__":
    main()
