"""Peak memory: an off-policy run of tiltlm with LoRA against plain LoRA fine-tuning with transformers and peft.

    python benchmarks/memory.py [--case gpt2:32] [--rows 8] [--dtype auto] [--rounds 3]

tiltlm holds base, policy and proposal (q ← π at every step, so it is sampled from after the first) on one set of
weights, and samples, scores and trains. The plain side trains the same adapter (rank 8 on all linear layers) by
cross-entropy on as many uniformly random sequences of the same length. Both use Adam and the same number of rows per
forward pass. With --dtype auto the plain side computes under bfloat16 autocast.
"""

from __future__ import annotations

from models import Case, add_cases, folder_of
from side_by_side import Side, Turns, add_dtype, parser, show, take_turns, tally


def ours(turns: Turns, folder: str, batch: int, length: int, dtype: str, rows: int) -> None:
    from sides import our_trainer

    from tiltlm.training.proposal_rules import proposal_rule

    rule = proposal_rule("interval", check_steps=1)
    trainer = our_trainer(folder, rule=rule, batch=batch, length=length, dtype=dtype, rows=rows, lora=True)
    turns.serve(trainer.train_step)


def plain(turns: Turns, folder: str, batch: int, length: int, dtype: str, rows: int) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from sides import LEARNING_RATE, LORA, load

    base, tokenizer = load(folder)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **LORA))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=LEARNING_RATE)

    def step() -> None:
        sequences = torch.randint(base.config.vocab_size, (batch, 1 + length))
        sequences[:, 0] = tokenizer.bos_token_id
        tally.drawn(batch, batch * length)
        for chunk in sequences.split(rows):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype != "float32"):
                loss = model(chunk, labels=chunk, use_cache=False).loss
            (loss * len(chunk) / batch).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    turns.serve(step)


def main() -> None:
    arguments = parser(__doc__, rounds=3)
    add_dtype(arguments)
    add_cases(arguments, "gpt2:32")
    arguments.add_argument("--rows", type=int, default=8, help="rows per forward pass, on both sides (8)")
    args = arguments.parse_args()
    if args.quick:
        args.case, args.length, args.rounds = [Case("tiny", 8)], 5, 2
    for case in args.case:
        with folder_of(case.model) as folder:
            sizes = {"folder": folder, "batch": case.n, "length": args.length}
            settings = {**sizes, "dtype": args.dtype, "rows": args.rows}
            sides = [Side("ours, off-policy", ours, case.n, settings), Side("plain LoRA", plain, case.n, settings)]
            mine, theirs = take_turns(sides, args.rounds)
        what = f"a LoRA step, {case} of {args.length} tokens, {args.rows} rows a pass, {args.dtype}"
        show(what, [(theirs, mine)])
        print(f"peak memory, ours / plain LoRA: {mine.peak / theirs.peak:.3f}")


if __name__ == "__main__":
    main()
