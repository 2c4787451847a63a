"""A full training step: tiltlm (GDC++ on-policy, RLOO) against TRL's RLOOTrainer and GRPOTrainer, on the same reward.

    pip install --constraint constraints.txt --editable ".[bench]"
    python benchmarks/step.py [--dtype auto] [--device cuda] [--case embedded:512 gpt2:32] [--rounds 5]
    python benchmarks/step.py --sweep [--case embedded:512]       find the fastest --trl-rows for TRL on this machine
    python benchmarks/step.py --trl-checkpointing                 TRL with its least memory

The prompt is BOS, a batch is its completions, with one optimizer step per batch. All sides tune all weights with Adam
at a constant rate and clip gradients at norm 1. The reward is the share of vowels and beta is 0.05. tiltlm's target is
a(x) exp(r/0.05), the optimum of the other methods' objective with their reference model. TRL samples with transformers
(no vLLM), logs and saves nothing, and keeps activations (its default, gradient checkpointing, trades speed for memory).
The rest is TRL's default: fused AdamW without weight decay. All completions of a step are drawn at once. Its forward
passes take --trl-rows of them, by per_device_train_batch_size and gradient accumulation. 8, the default, is faster on a
CPU than the whole batch and needs less memory; --sweep measures others. The time is from on_step_begin to on_step_end.
With --dtype float32 TRL computes in float32 (bf16=False), with auto in its default, bfloat16 autocast over float32
weights.
"""

from __future__ import annotations

import tempfile

from models import Case, add_cases, folder_of
from side_by_side import Over, Side, Turns, add_device, add_dtype, count_positions, parser, ratio, show, take_turns


def ours(turns: Turns, folder: str, method: str, batch: int, length: int, dtype: str, device: str) -> None:
    from sides import BETA, our_trainer

    from tiltlm.objectives import RLOO, GDCPlusPlus

    objective = RLOO(beta=BETA) if method == "RLOO" else GDCPlusPlus()
    trainer = our_trainer(folder, objective=objective, batch=batch, length=length, dtype=dtype, device=device)
    sequences, passes = trainer.counter.sequences, trainer.counter.forward_passes
    try:
        turns.serve(trainer.train_step)
    except Over:
        counted = (trainer.counter.forward_passes - passes) / (trainer.counter.sequences - sequences)
        print(f"  tiltlm by its own counter: {counted:.2f} passes per trained sequence", flush=True)
        raise


def theirs(
    turns: Turns,
    folder: str,
    method: str,
    batch: int,
    length: int,
    dtype: str,
    device: str,
    rows: int,
    checkpointing: bool,
) -> None:
    import trl
    from datasets import Dataset
    from sides import BETA, LEARNING_RATE, vowels
    from transformers import AutoConfig, AutoTokenizer, TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *arguments: object, **keywords: object) -> None:
            turns.begin()

        def on_step_end(self, *arguments: object, **keywords: object) -> None:
            turns.end()

    trainers = {"RLOO": (trl.RLOOConfig, trl.RLOOTrainer), "GRPO": (trl.GRPOConfig, trl.GRPOTrainer)}
    config_class, trainer_class = trainers[method]
    with tempfile.TemporaryDirectory(prefix="tiltlm-bench-") as output:
        config = config_class(
            output_dir=output,
            beta=BETA,
            num_generations=batch,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=batch // rows,
            max_completion_length=length,
            temperature=1.0,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            max_steps=10**6,
            activation_checkpointing=checkpointing,
            bf16=dtype != "float32",
            model_init_kwargs={"dtype": "float32"},
            use_cpu=device == "cpu",
            dataloader_pin_memory=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        count_positions(AutoConfig.from_pretrained(folder).vocab_size)
        trainer = trainer_class(
            model=folder,
            reward_funcs=vowels,
            args=config,
            # The tokenizers put BOS before a text, so the empty text is BOS alone.
            train_dataset=Dataset.from_dict({"prompt": [""] * 1000}),
            processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
            callbacks=[Clock()],
        )
        trainer.train()


def main() -> None:
    arguments = parser(__doc__, rounds=5)
    add_dtype(arguments)
    add_device(arguments)
    add_cases(arguments, "embedded:512", "gpt2:32")
    arguments.add_argument("--trl-rows", type=int, default=8, help="rows per forward pass of TRL (8)")
    arguments.add_argument("--trl-checkpointing", action="store_true", help="TRL with gradient checkpointing")
    arguments.add_argument("--sweep", action="store_true", help="only measure TRL with different --trl-rows")
    args = arguments.parse_args()
    if args.quick:
        args.case, args.length, args.rounds = [Case("embedded", 8), Case("tiny", 8)], 5, 2
    for case in args.case:
        with folder_of(case.model) as folder:
            sizes = {"folder": folder, "batch": case.n, "length": args.length, "dtype": args.dtype}
            sizes["device"] = args.device

            def trl_side(method: str, rows: int, case: Case = case, sizes: dict[str, object] = sizes) -> Side:
                settings = {**sizes, "method": method, "rows": rows, "checkpointing": args.trl_checkpointing}
                return Side(f"TRL {method}, {rows} rows", theirs, case.n, settings)

            if args.sweep:
                sweep(case, [trl_side("RLOO", case.n // parts) for parts in (1, 4, 16, 64) if case.n % parts == 0])
                continue
            rows = min(args.trl_rows, case.n)
            if case.n % rows:
                arguments.error(f"--trl-rows {rows} does not divide {case.n}, the sequences of a step")
            own = [Side(f"ours, {name}", ours, case.n, {**sizes, "method": name}) for name in ("GDC++", "RLOO")]
            gdc, rloo, their_rloo, their_grpo = take_turns(
                [*own, trl_side("RLOO", rows), trl_side("GRPO", rows)], args.rounds
            )
        lean = ", TRL with gradient checkpointing" if args.trl_checkpointing else ""
        what = f"a full step, {case} of up to {args.length} tokens, {args.dtype}{lean}"
        show(what, [(their_rloo, gdc), (their_rloo, rloo), (their_grpo, gdc)])


def sweep(case: Case, sides: list[Side]) -> None:
    """Two rounds of TRL's RLOO with each number of rows per forward pass."""
    print(f"\n{case}: rows per forward pass of TRL, against the whole batch")
    first, *rest = take_turns(sides, 2)
    print(f"  {first}")
    for result in rest:
        print(f"  {result}; {ratio(result, first)} times its time", flush=True)


if __name__ == "__main__":
    main()
