"""The effect of choices in public implementations, on samples of the embedded model: docs/results/deviations.md.

python studies/deviations.py studies/embedded.yaml --samples 4096
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable

import torch
from base_rates import study_sample
from torch import Tensor

from tiltlm.app.build import build_terms
from tiltlm.estimation import Estimate, mean, self_bleu_5
from tiltlm.lm import LanguageModel, Samples, SamplingSettings
from tiltlm.targets import measure_samples
from tiltlm.targets.moments import fit_moments

WOMEN, MEN = {"she", "her", "herself"}, {"he", "him", "himself"}


def eos_as_padding(base: LanguageModel, samples: Samples) -> str:
    """EOS scored as padding, with log-probability 0."""
    ends = torch.isin(samples.tokens, torch.tensor(base.eos_ids)) & samples.mask
    missing = torch.where(ends, samples.proposal_logprob.double(), 0.0).sum(-1)
    total = mean((-missing).exp())
    return f"{mean(ends.any(-1).double())} of texts end before their limit; all probabilities sum to {total} then"


def underflow(samples: Samples) -> str:
    """P exponentiated in float32 before ratios are computed."""
    lost = samples.sequence_logprob.float().exp() == 0
    return f"log a is {mean(samples.sequence_logprob.double())}; exp of it is 0 for {mean(lost.double())} of texts"


def warped(base: LanguageModel, count: int, seed: int, length: int) -> str:
    """Samples under top-p 0.9 scored by the full distribution."""
    samples = base.sample(count, None, seed, max_completion_length=length, top_p=0.9)
    with torch.no_grad():
        scored = base.logprob(samples, settings=SamplingSettings()).double().sum(-1)
    return f"log q − log a is {mean(samples.sequence_logprob.double() - scored)} per text, and assumed to be 0"


def pronouns(texts: list[str]) -> str:
    """Pronouns counted only in lower case."""

    def share(case: Callable[[str], str]) -> Estimate:
        words = [re.findall(r"\w+", case(text)) for text in texts]
        more = [sum(w in WOMEN for w in row) > sum(w in MEN for w in row) for row in words]
        return mean(torch.tensor(more).double())

    return f"more women's pronouns than men's: {share(str)} of texts with case, {share(str.lower)} without"


def characters(samples: Samples) -> str:
    """Self-BLEU-5 on strings."""
    texts = samples.texts[:500]
    tokens = self_bleu_5(samples.completion_ids[:500])
    return f"Self-BLEU-5 of 500 texts: {self_bleu_5([list(text) for text in texts])} on characters, {tokens} on tokens"


def ascent(features: Tensor, goals: list[float], rate: float = 0.5, most: int = 1000, near: float = 0.01) -> str:
    """λ by gradient ascent to an error of 0.01, with a forward pass of both models at every iteration."""
    wanted, coefficients, steps = torch.tensor(goals).double(), torch.zeros(len(goals)).double(), 0
    while float((gap := wanted - (features @ coefficients).softmax(0) @ features).norm()) >= near and steps < most:
        coefficients += rate * gap
        steps += 1
    passes = 2 * len(features) * steps
    worst = f"{float(gap.abs().max()):.4f}"
    text = f"{steps} iterations, {passes:,} more passes, error {worst}"
    if 1.0 in goals:
        kept = (features @ coefficients).softmax(0) @ features[:, goals.index(1.0)]
        return f"{text}; {1 - float(kept):.4f} of p is outside the filter"
    newton = fit_moments(features, torch.zeros(len(features)).double(), goals, [""] * len(goals))
    return f"{text}; by Newton's method no more passes, error {newton.residual:.0e}"


def hitless(rate: float, count: int = 512) -> str:
    """KL(p‖π) on samples of the base."""
    return f"Z = {rate:.4f}: no hit among {count} with probability {(1 - rate) ** count:.2g}, and then it is −log Z"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study")
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=54_321)
    asked = parser.parse_args()
    configs, base, samples = study_sample(asked.study, asked.samples, asked.seed)
    length = next(iter(configs.values())).max_completion_length
    print("end scored as padding:", eos_as_padding(base, samples))
    print("exp(log P) in float32:", underflow(samples))
    print("top-p 0.9 scored without top-p:", warped(base, 1024, asked.seed, length))
    print("words with case:", pronouns(samples.texts))
    print("characters:", characters(samples))
    for name, config in configs.items():
        terms = build_terms(config)
        values = measure_samples([term.feature for term in terms], samples)
        goals = [float(term.goal or math.nan) for term in terms]
        if len(goals) == 1 and goals[0] == 1.0:
            print(f"KL(p‖π) on 512 samples of a, {name}:", hitless(float(values.mean())))
        if bool((values.amax(0) > values.amin(0)).all()):
            print(f"λ by ascent, {name}:", ascent(values, goals))


if __name__ == "__main__":
    main()
