"""Sampling with log-probabilities: ours against transformers' generate(), side by side in one run.

    python benchmarks/sampling.py [--samples 512] [--length 40] [--rounds 5]

A B A B ..., each timed whole; prints the median of the ratios. Both draw from the plain law of the embedded model in
float32; generate() returns its scores, from which the log-probabilities of its tokens are read.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from tiltlm.lm import LanguageModel


def ours(model: LanguageModel, n: int, length: int, seed: int) -> None:
    samples = model.sample(n, seed=seed, max_completion_length=length)
    assert len(samples) == n


def theirs(model: LanguageModel, n: int, length: int, seed: int, scores: bool) -> None:
    torch.manual_seed(seed)
    prompts = torch.full((n, 1), model.start_id)
    output = model.model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=length,
        pad_token_id=model.pad_id,
        return_dict_in_generate=True,
        output_scores=scores,
    )
    if scores:
        model.model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--length", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = LanguageModel.from_pretrained("embedded", device="cpu")
    print(f"{args.samples} sequences of up to {args.length} tokens, {torch.get_num_threads()} threads, float32")
    for scores in (False, True):
        ratios = []
        for round_number in range(args.rounds + 1):
            began = time.perf_counter()
            ours(model, args.samples, args.length, round_number)
            between = time.perf_counter()
            theirs(model, args.samples, args.length, round_number, scores)
            done = time.perf_counter()
            if round_number > 0:  # the first warms up
                ratios.append((done - between) / (between - began))
        name = "generate() with scores" if scores else "generate()"
        print(
            f"{name} / ours: median {statistics.median(ratios):.2f}, "
            f"from {min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds"
        )


if __name__ == "__main__":
    main()
