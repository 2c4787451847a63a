"""Sampling with log-probabilities: tiltlm against transformers' generate(), with and without its scores.

    python benchmarks/sampling.py [--dtype auto] [--device cuda] [--case embedded:512 gpt2:32 gpt2:128] [--rounds 5]

All sides draw from the model's distribution (temperature 1, no top-k or top-p), after BOS alone. The embedded model
ends its sequences itself. The GPT-2 shape has random weights and cannot draw EOS, so all its sequences have the full
length. With scores, generate() also returns what log-probabilities are computed from; tiltlm always returns
log-probabilities. With --dtype auto tiltlm is compared with generate() of the float32 model and of a model in bfloat16.
"""

from __future__ import annotations

from models import Case, add_cases, folder_of
from side_by_side import Side, Turns, add_device, add_dtype, count_positions, parser, show, take_turns, tally


def ours(turns: Turns, folder: str, n: int, length: int, dtype: str, device: str) -> None:
    from tiltlm.lm import LanguageModel

    model = LanguageModel.from_pretrained(folder, device=device, dtype=dtype)
    count_positions(model.vocab_size)
    seeds = iter(range(10**6))

    def step() -> None:
        samples = model.sample(n, seed=next(seeds), max_completion_length=length)
        tally.drawn(len(samples), int(samples.mask.sum()))

    turns.serve(step)


def theirs(turns: Turns, folder: str, n: int, length: int, dtype: str, device: str, scores: bool) -> None:
    import torch
    from sides import generate, load

    model, tokenizer = load(folder, dtype, device)
    torch.manual_seed(0)

    def step() -> None:
        output = generate(model, tokenizer, n, length, return_dict_in_generate=True, output_scores=scores)
        if scores:
            model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
        ended = (output.sequences[:, 1:] == tokenizer.eos_token_id).cumsum(-1)
        # Tokens up to and including the first EOS.
        tally.drawn(n, int((ended == 0).sum() + (ended[:, -1] > 0).sum()))

    turns.serve(step)


def main() -> None:
    arguments = parser(__doc__, rounds=5)
    add_dtype(arguments)
    add_device(arguments)
    add_cases(arguments, "embedded:512", "gpt2:32", "gpt2:128")
    args = arguments.parse_args()
    if args.quick:
        args.case, args.length, args.rounds = [Case("embedded", 4), Case("tiny", 4)], 5, 2
    dtypes = ["float32"] if args.dtype == "float32" else ["float32", "bfloat16"]
    for case in args.case:
        with folder_of(case.model) as folder:
            sizes = {"folder": folder, "n": case.n, "length": args.length, "device": args.device}
            mine = Side("ours", ours, case.n, {**sizes, "dtype": args.dtype})
            others = [
                Side(
                    f"generate() {dtype}" + (" with scores" if scores else ""),
                    theirs,
                    case.n,
                    {**sizes, "dtype": dtype, "scores": scores},
                )
                for dtype in dtypes
                for scores in (False, True)
            ]
            first, *rest = take_turns([mine, *others], args.rounds)
        what = f"sampling, {case} of up to {args.length} tokens, {args.dtype}"
        show(what, [(result, first) for result in rest])


if __name__ == "__main__":
    main()
