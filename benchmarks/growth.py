"""Step time and peak memory of tiltlm (GDC++, on-policy) by batch size, length, vocabulary and model size.

    python benchmarks/growth.py [--only batch] [--dtype auto] [--device cuda] [--rounds 3]

batch       64 to 4,096 sequences of the embedded model, up to 40 tokens each
length      20 to 512 tokens, 32 sequences of a small model with random weights
vocabulary  2,048 to 151,936 tokens, 32 sequences of 40 tokens of that model
size        2M to 355M parameters with random weights, 16 sequences of 40 tokens; larger models have more words

Each workload runs in a process of its own, so peak memory is per workload. Full fine-tuning with Adam holds five copies
of the weights (policy, gradient, two moments, base). Models with random weights never draw EOS, so lengths are exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from models import EMBEDDED, GPT2, TINY, Shape, folder_of
from side_by_side import MIB, Result, Side, Turns, add_device, add_dtype, machine, parser, take_turns

SMALL = Shape(4096, 256, 4)
SIZES = {
    "2M": Shape(4096, 192, 3),
    "10M": Shape(8192, 384, 4),
    "43M": Shape(32768, 512, 8),
    "124M": GPT2,
    "355M": Shape(50257, 1024, 24),
}


@dataclass(frozen=True)
class Workload:
    """One row of a table."""

    label: str
    model: str | Shape
    batch: int
    length: int = 40


def workloads(axis: str) -> list[Workload]:
    """The workloads of a table."""
    if axis == "batch":
        return [Workload(f"{n:,}", EMBEDDED, n) for n in (64, 128, 256, 512, 1024, 2048, 4096)]
    if axis == "length":
        return [Workload(str(n), SMALL, 32, n) for n in (20, 40, 80, 160, 320, 512)]
    if axis == "vocabulary":
        sizes = (2048, 8192, 32768, 65536, 151936)
        return [Workload(f"{n:,}", Shape(n, SMALL.hidden, SMALL.layers), 32) for n in sizes]
    return [Workload(name, shape, 16) for name, shape in SIZES.items()]


def quick_workloads(axis: str) -> list[Workload]:
    """Two small workloads of a table."""
    return {
        "batch": [Workload("8", EMBEDDED, 8, 5), Workload("16", EMBEDDED, 16, 5)],
        "length": [Workload("5", TINY, 8, 5), Workload("10", TINY, 8, 10)],
        "vocabulary": [Workload("300", TINY, 8, 5), Workload("600", Shape(600, 32, 2, 64), 8, 5)],
        "size": [Workload("tiny", TINY, 8, 5), Workload("twice", Shape(300, 64, 2, 64), 8, 5)],
    }[axis]


def ours(turns: Turns, folder: str, batch: int, length: int, dtype: str, device: str) -> None:
    from sides import our_trainer

    trainer = our_trainer(folder, batch=batch, length=length, dtype=dtype, device=device)
    turns.serve(trainer.train_step)


def measured(chosen: list[Workload], rounds: int, dtype: str, device: str) -> Iterator[tuple[Workload, Result]]:
    """Each workload with the result of its step."""
    for workload in chosen:
        with folder_of(workload.model) as folder:
            settings = {"folder": folder, "batch": workload.batch, "length": workload.length}
            settings |= {"dtype": dtype, "device": device}
            yield workload, take_turns([Side("ours", ours, workload.batch, settings)], rounds)[0]


def main() -> None:
    axes = ("batch", "length", "vocabulary", "size")
    arguments = parser(__doc__, rounds=3)
    add_dtype(arguments)
    add_device(arguments)
    arguments.add_argument("--only", choices=axes, help="one of the tables")
    args = arguments.parse_args()
    print(f"A training step of tiltlm, {args.dtype}; {machine()}")
    for axis in [args.only] if args.only else axes:
        print(
            f"\n| {axis} | seconds a step | ms a sequence | relative | ms a token | passes a token "
            f"| peak memory, MiB | of it after loading |\n| {' | '.join(['---'] * 8)} |"
        )
        first = None
        chosen = quick_workloads(axis) if args.quick else workloads(axis)
        for workload, result in measured(chosen, args.rounds, args.dtype, args.device):
            each = 1000 * result.median / workload.batch
            first = first or each
            print(
                f"| {workload.label} | {result.median:.3f} | {each:.2f} | {each / first:.2f} "
                f"| {each / result.length:.3f} | {result.passes:.2f} "
                f"| {result.peak / MIB:,.0f} | {result.held / MIB:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
