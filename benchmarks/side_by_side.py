"""A harness that runs the sides of a comparison in turn (A B A B), each in its own process, the others idle."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

MIB = 2**20


@dataclass
class Tally:
    """Counts of a process: positions that went through a model, sequences and tokens drawn."""

    positions: int = 0
    sequences: int = 0
    tokens: int = 0

    def drawn(self, sequences: int, tokens: int) -> None:
        """Count drawn sequences and their tokens, without padding."""
        self.sequences += sequences
        self.tokens += tokens


# The counts of this process; all sides use it in the same way.
tally = Tally()
_counted: set[int] = set()


def count_positions(vocabulary: int) -> None:
    """From now on, count all positions of forward passes of any model of this process, padding included.

    Every forward pass uses the embedding with ``vocabulary`` rows, so positions are counted there. Recomputation by
    gradient checkpointing is not counted.
    """
    if vocabulary in _counted:
        return
    _counted.add(vocabulary)
    import torch

    original = torch.nn.Embedding.forward

    def counting(self: torch.nn.Embedding, input: torch.Tensor) -> torch.Tensor:
        if self.num_embeddings == vocabulary:
            tally.positions += input.numel()
        return original(self, input)

    torch.nn.Embedding.forward = counting  # type: ignore[method-assign]


def memory(name: str) -> int:
    """Memory of this process in bytes: ``VmHWM``, its peak, or ``VmRSS``, its present size."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}; the benchmarks need Linux")


def settle() -> None:
    """Wait until the GPU has finished."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def held_memory() -> int:
    """Present memory of this process in bytes; memory of the GPU if it uses one."""
    import torch

    return torch.cuda.memory_allocated() if torch.cuda.is_initialized() else memory("VmRSS")


def peak_memory() -> int:
    """Peak memory of this process in bytes; memory of the GPU if it uses one."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else memory("VmHWM")


class Over(Exception):
    """Raised in a side when there are no more turns."""


@dataclass(frozen=True)
class Ready:
    """The report of a side once it is loaded: its memory in bytes, and its threads."""

    held: int
    threads: int


@dataclass(frozen=True)
class Turn:
    """One turn of a side: seconds, counts, and peak memory so far in bytes."""

    seconds: float
    tally: Tally
    peak: int


class Turns:
    """The turns as a side sees them: ``begin`` waits for the next turn, ``end`` stops the clock."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._ready = False
        self._began = 0.0
        self._before = Tally()

    def begin(self) -> None:
        """Wait for the next turn and start the clock. Raises Over after the last one."""
        if not self._ready:
            import torch

            self._ready = True
            self._connection.send(Ready(held_memory(), torch.get_num_threads()))
        if self._connection.recv() == "over":
            raise Over
        self._before = Tally(**vars(tally))
        settle()
        self._began = time.perf_counter()

    def end(self) -> None:
        """Stop the clock and report."""
        settle()
        seconds = time.perf_counter() - self._began
        added = Tally(**{name: value - getattr(self._before, name) for name, value in vars(tally).items()})
        self._connection.send(Turn(seconds, added, peak_memory()))

    def serve(self, step: Callable[[], object]) -> None:
        """Run ``step`` once in each turn, until Over is raised."""
        while True:
            self.begin()
            step()
            self.end()


@dataclass(frozen=True)
class Side:
    """One side: ``work(turns, **settings)``, a function of a module that the new process can import.

    ``trained`` is the number of sequences that one turn trains on (or draws, where nothing is trained).
    """

    name: str
    work: Callable[..., None]
    trained: int
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """Results of a side: seconds per turn, passes per trained token, tokens per sequence, memory in bytes."""

    name: str
    seconds: tuple[float, ...]
    passes: float
    length: float
    held: int
    peak: int
    threads: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.median:.3f} s ({min(self.seconds):.3f} to {max(self.seconds):.3f}), "
            f"{self.passes:.2f} passes a token, {self.length:.1f} tokens a sequence, peak memory "
            f"{self.peak / MIB:,.0f} MiB = {self.held / MIB:,.0f} after loading "
            f"+ {(self.peak - self.held) / MIB:,.0f}, {self.threads} threads"
        )


def _worker(connection: Connection, side: Side) -> None:
    try:
        side.work(Turns(connection), **side.settings)
    except (Over, EOFError):
        return
    except BaseException:
        connection.send(traceback.format_exc())


def take_turns(sides: Sequence[Side], rounds: int) -> list[Result]:
    """Load all sides, let each warm up with one turn, then run them in turn ``rounds`` times.

    Raises RuntimeError with the traceback if a side fails.
    """
    # Libraries read these when imported, also in the new processes.
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    context = get_context("spawn")
    connections, processes = [], []
    try:
        ready, turns = [], []
        for side in sides:
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(theirs, side), daemon=True)
            process.start()
            theirs.close()
            connections.append(ours)
            processes.append(process)
            ready.append(_answer(ours, side))
        for turn in range(rounds + 1):
            answers = []
            for side, connection in zip(sides, connections, strict=True):
                connection.send("go")
                answers.append(_answer(connection, side))
            if turn > 0:  # the first warms up
                turns.append(answers)
        return [
            _result(side, loaded, [answers[k] for answers in turns])
            for k, (side, loaded) in enumerate(zip(sides, ready, strict=True))
        ]
    finally:
        for connection, process in zip(connections, processes, strict=True):
            _dismiss(connection, process)


def _answer(connection: Connection, side: Side) -> Any:
    try:
        answer = connection.recv()
    except EOFError:
        raise RuntimeError(f"{side.name}: its process ended without a result (out of memory?)") from None
    if isinstance(answer, str):
        raise RuntimeError(f"{side.name} failed:\n{answer}")
    return answer


def _dismiss(connection: Connection, process: Any) -> None:
    with contextlib.suppress(OSError):  # it has ended already
        connection.send("over")
    process.join(timeout=60)
    if process.is_alive():
        process.terminate()
    connection.close()


def _result(side: Side, ready: Ready, turns: Sequence[Turn]) -> Result:
    positions, sequences, tokens = (
        sum(getattr(turn.tally, name) for turn in turns) for name in ("positions", "sequences", "tokens")
    )
    length = tokens / max(1, sequences)
    trained = side.trained * len(turns) * length
    return Result(
        name=side.name,
        seconds=tuple(turn.seconds for turn in turns),
        passes=positions / trained if trained else float("nan"),
        length=length,
        held=ready.held,
        peak=turns[-1].peak,
        threads=ready.threads,
    )


def ratio(theirs: Result, ours: Result) -> str:
    """The median of theirs / ours over the rounds, with minimum and maximum."""
    ratios = [a / b for a, b in zip(theirs.seconds, ours.seconds, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def machine() -> str:
    """Date, processor and versions, for the tables."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    versions = []
    for package in ("torch", "transformers", "trl"):
        try:
            versions.append(f"{package} {metadata.version(package).partition('+')[0]}")
        except metadata.PackageNotFoundError:
            continue
    cpu = " ".join(names[0].replace("(R)", "").split()) if names else "unknown processor"
    threads = os.environ.get("OMP_NUM_THREADS")
    bound = f" with OMP_NUM_THREADS={threads}" if threads else ""
    return f"{datetime.date.today()}, {_gpu()}{os.cpu_count()} cores of {cpu}{bound}, {', '.join(versions)}"


def _gpu() -> str:
    """The name of the GPU if the command uses it."""
    if not any(argument.endswith("cuda") for argument in sys.argv):
        return ""
    import torch

    return f"{torch.cuda.get_device_name()}, "


def show(what: str, pairs: Sequence[tuple[Result, Result]]) -> None:
    """Print the result of each side, and a row of README.md's table for each pair (theirs, ours)."""
    command = shlex.join(["python", *sys.argv])
    results = {id(result): result for pair in pairs for result in reversed(pair)}
    print(f"\n{what}")
    for result in results.values():
        print(f"  {result}")
    for theirs, ours in pairs:
        print(
            f"| `{command}` | {what}: {theirs.name} / {ours.name} | {ratio(theirs, ours)} "
            f"| {theirs.passes:.2f} / {ours.passes:.2f} "
            f"| {theirs.peak / MIB:,.0f} / {ours.peak / MIB:,.0f} ({ours.peak / theirs.peak:.0%}) | {machine()} |",
            flush=True,
        )


def parser(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """A parser with the common options of all benchmarks."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds, help=f"measured turns of each side ({rounds})")
    made.add_argument("--quick", action="store_true", help="tiny sizes, to check that it runs")
    return made


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--device``."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of all sides (cpu)")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--dtype``."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "auto"),
        default="float32",
        help="auto: float32 weights, bfloat16 compute if the hardware has it (float32)",
    )
