"""Base rates of the constraints of a study's tasks, alone and together, on one sample of the base.

python studies/base_rates.py studies/embedded.yaml --samples 20000
"""

from __future__ import annotations

import argparse

import torch

from tiltlm.app.build import build_base, build_terms
from tiltlm.app.prompts import encode_prompts, read_prompts
from tiltlm.config.run import RunConfig, parse_config
from tiltlm.config.study import load_study
from tiltlm.estimation import mean
from tiltlm.lm import LanguageModel, Samples
from tiltlm.targets import measure_samples


def study_sample(path: str, count: int, seed: int) -> tuple[dict[str, RunConfig], LanguageModel, Samples]:
    """The config of each task of a study, their base, and samples of the base."""
    study = load_study(path)
    configs = {name: parse_config({**study.shared, "target": task.target}) for name, task in study.tasks.items()}
    first = next(iter(configs.values()))
    base = build_base(first)
    prompts = encode_prompts(base, read_prompts(first).training)
    with torch.no_grad():
        samples = base.sample(count, prompts, seed, max_completion_length=first.max_completion_length)
    return configs, base, samples


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=12_345)
    asked = parser.parse_args()
    configs, _, samples = study_sample(asked.study, asked.samples, asked.seed)
    for name, config in configs.items():
        features = [term.feature for term in build_terms(config)]
        values = measure_samples(features, samples)
        rates = [f"{f.name} {mean(column)}" for f, column in zip(features, values.unbind(-1), strict=True)]
        together = f"; together {mean(values.prod(-1))}" if len(features) > 1 else ""
        print(f"{name}: {', '.join(rates)}{together}")


if __name__ == "__main__":
    main()
