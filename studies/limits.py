"""What a method's figures are read against: KL(p‖π) of the guide alone, and of likelihood on texts of p itself.

python studies/limits.py studies/embedded.yaml docs/results/embedded --tasks politics science
python studies/limits.py studies/embedded.yaml docs/results/embedded --tasks politics --likelihood 2000
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
from tiltlm.lm import LanguageModel, Law
from tiltlm.study.file import load_study
from tiltlm.study.reference import Reference, load_reference
from tiltlm.targets import fit_target
from tiltlm.targets.twist import Twist
from tiltlm.training.checkpoint import load_base_sample

# Likelihood trains on texts behind those that it is measured on.
HELD_OUT, BATCH = 1536, 256


def of_guide(base: LanguageModel, config: RunConfig, folder: Path, reference: Reference) -> tuple[Estimate, int]:
    """KL(p‖g) of the guide that the fit's samples make, and how many states it has."""
    sample = load_base_sample(folder, base)
    assert sample is not None
    target = fit_target(build_terms(config), sample)
    guide = base.placed(Twist.of(base, target, sample).toward(target, sample))
    count = min(4096, len(reference))
    samples = replace(reference.samples.select(torch.arange(count)), guide=guide, law=Law())
    with torch.no_grad():
        return reference.kl(base.logprob(samples).double().sum(-1)), len(guide.transitions)


def of_likelihood(
    base: LanguageModel, config: RunConfig, reference: Reference, count: int, epochs: int
) -> Iterator[str]:
    """KL(p‖π) after each epoch over ``count`` texts drawn from the reference by their weights."""
    generator = torch.Generator().manual_seed(config.seed)
    held, weights = torch.arange(HELD_OUT), reference.weights[HELD_OUT:]
    places = (torch.arange(count) + torch.rand(1, generator=generator)) / count
    found = torch.searchsorted((weights / weights.sum()).cumsum(0), places.double())
    texts = found.clamp_max(len(weights) - 1) + HELD_OUT
    yield f"{len(texts.unique()):,} different texts of {count:,}"
    policy = base.with_lora(seed=config.seed, **(config.peft or {}))
    learned = [p for p in policy.model.parameters() if p.requires_grad]
    rate, steps, done = config.training.learning_rate, epochs * (count // BATCH), 0
    optimizer = torch.optim.Adam(learned, rate)
    for epoch in range(epochs):
        order = texts[torch.randperm(count, generator=generator)]
        for start in range(0, count - BATCH + 1, BATCH):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (done + 1) / 5) * (1 - done / steps)
            optimizer.zero_grad()
            batch = reference.samples.select(order[start : start + BATCH])
            (-policy.logprob(batch, law=Law()).sum(-1).mean()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            done += 1
        with torch.no_grad():
            logprob = policy.logprob(reference.samples.select(held), law=Law()).double().sum(-1)
        yield f"epoch {epoch + 1}: {reference.kl(logprob)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study")
    parser.add_argument("results", type=Path, help="the study's folder, with its references")
    parser.add_argument("--tasks", nargs="+")
    parser.add_argument("--likelihood", type=int, metavar="TEXTS")
    parser.add_argument("--epochs", type=int, default=8)
    asked = parser.parse_args()
    study = load_study(asked.study)
    for name in asked.tasks or study.tasks:
        config = parse_config({**study.shared, "target": study.tasks[name].target})
        base, folder = build_base(config), asked.results / "references" / name
        reference = load_reference(folder, base, config)
        if asked.likelihood:
            for line in of_likelihood(base, config, reference, asked.likelihood, asked.epochs):
                print(f"{name}: {line}", flush=True)
            continue
        kl, states = of_guide(base.freeze(), config, folder, reference)
        print(f"{name}: KL(p‖a) {reference.kl_p_a}, KL(p‖g) {kl}, a guide of {states:,} states", flush=True)


if __name__ == "__main__":
    main()
