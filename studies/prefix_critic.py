"""How much better than the guide a critic on the base's hidden state would predict P/a from a prefix.

    python studies/prefix_critic.py studies/embedded.yaml --task female politics positive

For each task and several prefix lengths, R² of w = P/(Z a) on texts that were not used for the guide: of the guide's
value ψ, and of ψ plus a ridge regression of its residual on the last hidden state. The regression is fitted on the
other half of these texts. The best of five strengths is shown, so its R² is slightly too high.
"""

from __future__ import annotations

import argparse

import torch
from base_rates import study_sample
from torch import Tensor

from tiltlm.app.build import build_terms
from tiltlm.guides import guide_toward
from tiltlm.lm import LanguageModel, Samples
from tiltlm.targets import FittedTarget, draw_base_sample, fit_target, measure_samples

LENGTHS = (3, 6, 11, 16, 21)
STRENGTHS = (30.0, 100.0, 300.0, 1000.0, 3000.0)


def hidden_states(base: LanguageModel, samples: Samples, at_once: int = 256) -> Tensor:
    """The last hidden state after each token [N, T, D] of texts without a prompt."""
    start = torch.full((len(samples), 1), base.tokenizer.bos_token_id)
    read = torch.cat([start, samples.tokens], 1).split(at_once)
    with torch.no_grad():
        parts = [base.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][:, 1:] for ids in read]
    return torch.cat(parts).double()


def r_squared(truth: Tensor, prediction: Tensor) -> float:
    """The share of the variance of ``truth`` [N] that ``prediction`` [N] explains."""
    return 1 - float((truth - prediction).square().mean() / truth.var(correction=0))


def with_critic(weights: Tensor, psi: Tensor, hidden: Tensor, strength: float) -> Tensor:
    """ψ plus the regression of its residual on hidden states [N, D], fitted on the other half of the texts [N]."""
    inputs = torch.cat([hidden, psi[:, None]], 1)
    inputs = (inputs - inputs.mean(0)) / inputs.std(0).clamp_min(1e-9)
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1).to(inputs)], 1)
    penalty = strength * torch.eye(inputs.shape[1]).to(inputs)
    penalty[-1, -1] = 0
    prediction = psi.clone()
    even = torch.arange(len(psi)) % 2 == 0
    for fit, held_out in ((even, ~even), (~even, even)):
        rows = inputs[fit]
        solution = torch.linalg.solve(rows.T @ rows + penalty, rows.T @ (weights - psi)[fit])
        prediction[held_out] += inputs[held_out] @ solution
    return prediction


def show(base: LanguageModel, target: FittedTarget, samples: Samples) -> None:
    """Print both R² at several lengths, on ``samples`` that the target was not fitted on."""
    guide = guide_toward(base, target, target.base_sample)
    psi = (guide.log_values(samples.tokens, samples.mask)[:, 1:].double() - guide.log_scale).exp()
    log_tilt = target.log_score(torch.zeros(len(samples)).double(), measure_samples(target.features, samples))
    weights = (log_tilt - target.report.log_z.value).exp()
    hidden = hidden_states(base, samples)
    ended = torch.isin(samples.tokens, torch.tensor(base.eos_ids)) | ~samples.mask
    for length in LENGTHS:
        on = ~ended[:, length - 1]
        w, p, h = weights[on], psi[on, length - 1], hidden[on, length - 1]
        best = max(r_squared(w, with_critic(w, p, h, strength)) for strength in STRENGTHS)
        print(f"  after {length:2d} tokens, {len(w):,} texts: guide {r_squared(w, p):.3f}, with a critic {best:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("study")
    parser.add_argument("--task", nargs="+", required=True)
    parser.add_argument("--fit", type=int, default=4096, help="samples for target and guide")
    parser.add_argument("--samples", type=int, default=8192, help="texts for R²")
    parser.add_argument("--seed", type=int, default=12_345)
    asked = parser.parse_args()
    configs, base, samples = study_sample(asked.study, asked.samples, asked.seed)
    for name in asked.task:
        terms = build_terms(configs[name])
        features = [term.feature for term in terms]
        length = configs[name].max_completion_length
        base_sample = draw_base_sample(base, features, asked.fit, base.encode_prompts(None), length, asked.seed + 1)
        print(f"{name}:")
        show(base, fit_target(terms, base_sample), samples)


if __name__ == "__main__":
    main()
