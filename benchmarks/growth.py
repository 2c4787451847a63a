"""How the step time and the peak memory of ours (GDC++, on-policy) grow with batch, length, vocabulary and model.

    python benchmarks/growth.py [--only batch] [--dtype auto] [--device cuda] [--rounds 3]

batch       64 to 4,096 sequences of the embedded model, up to 40 tokens each
length      20 to 512 tokens, 32 sequences of a small model with random weights
vocabulary  2,048 to 151,936 tokens, 32 sequences of 40 tokens of that model
size        2M to 355M parameters with random weights, 16 sequences of 40 tokens; the vocabulary grows along

Each point has a process of its own, so that its peak memory is its own. Full fine-tuning with Adam: the weights are
there five times over (policy, gradient, two moments, base). Random weights never draw EOS, so lengths are as stated.
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
class Point:
    """One row of a table."""

    label: str
    model: str | Shape
    batch: int
    length: int = 40


def points(axis: str) -> list[Point]:
    """The points along an axis, as the module says them."""
    if axis == "batch":
        return [Point(f"{n:,}", EMBEDDED, n) for n in (64, 128, 256, 512, 1024, 2048, 4096)]
    if axis == "length":
        return [Point(str(n), SMALL, 32, n) for n in (20, 40, 80, 160, 320, 512)]
    if axis == "vocabulary":
        sizes = (2048, 8192, 32768, 65536, 151936)
        return [Point(f"{n:,}", Shape(n, SMALL.hidden, SMALL.layers), 32) for n in sizes]
    return [Point(name, shape, 16) for name, shape in SIZES.items()]


def quick_points(axis: str) -> list[Point]:
    """Two small points along an axis."""
    return {
        "batch": [Point("8", EMBEDDED, 8, 5), Point("16", EMBEDDED, 16, 5)],
        "length": [Point("5", TINY, 8, 5), Point("10", TINY, 8, 10)],
        "vocabulary": [Point("300", TINY, 8, 5), Point("600", Shape(600, 32, 2, 64), 8, 5)],
        "size": [Point("tiny", TINY, 8, 5), Point("twice", Shape(300, 64, 2, 64), 8, 5)],
    }[axis]


def ours(turns: Turns, folder: str, batch: int, length: int, dtype: str, device: str) -> None:
    from sides import our_trainer

    trainer = our_trainer(folder, batch=batch, length=length, dtype=dtype, device=device)
    turns.serve(trainer.train_step)


def measured(along: list[Point], rounds: int, dtype: str, device: str) -> Iterator[tuple[Point, Result]]:
    """Each point with what its step took."""
    for point in along:
        with folder_of(point.model) as folder:
            settings = {"folder": folder, "batch": point.batch, "length": point.length}
            settings |= {"dtype": dtype, "device": device}
            yield point, take_turns([Side("ours", ours, point.batch, settings)], rounds)[0]


def main() -> None:
    axes = ("batch", "length", "vocabulary", "size")
    arguments = parser(__doc__, rounds=3)
    add_dtype(arguments)
    add_device(arguments)
    arguments.add_argument("--only", choices=axes, help="one of the tables")
    args = arguments.parse_args()
    print(f"A training step of ours, {args.dtype}; {machine()}")
    for axis in [args.only] if args.only else axes:
        print(
            f"\n| {axis} | seconds a step | ms a sequence | relative | ms a token | passes a token "
            f"| peak memory, MiB | of it after loading |\n| {' | '.join(['---'] * 8)} |"
        )
        first = None
        along = quick_points(axis) if args.quick else points(axis)
        for point, result in measured(along, args.rounds, args.dtype, args.device):
            each = 1000 * result.median / point.batch
            first = first or each
            print(
                f"| {point.label} | {result.median:.3f} | {each:.2f} | {each / first:.2f} | {each / result.length:.3f} "
                f"| {result.passes:.2f} | {result.peak / MIB:,.0f} | {result.held / MIB:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
