"""Speed of sampling, scoring and training in tiltlm as a share of the most that the machine allows.

    python benchmarks/roofline.py [--device cuda] [--dtype auto] [--case embedded:512 gpt2:32] [--rounds 5]

Bandwidth and peak rate are measured first, in the same process. Bandwidth is that of copying or of summing a large
tensor, whichever is higher. The peak rate is that of one large product in the dtype of the model's products (bfloat16
for --dtype auto if it is native). The least time follows from both:

sampling   for each token, load all weights and the cached keys and values once, and 2 operations per weight and row;
           the larger of the two times
scoring    2 operations per weight and token, and those of attention
training   three times as many: forward and backward of log-probabilities, without an optimizer

A share is the least time over the measured time. Weights are those of linear layers, output layer included. Embeddings,
norms, softmax and the draw are not counted, so no share reaches 100%.
"""

from __future__ import annotations

import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models import Case, add_cases, folder_of
from side_by_side import add_device, machine, parser, settle

if TYPE_CHECKING:
    import torch

    from tiltlm.lm import LanguageModel, Samples

# Bytes of the copied tensor, larger than any cache; rows and columns of the product.
COPIED = {"cpu": 2**30, "cuda": 4 * 2**30}
MULTIPLIED = {"cpu": 4096, "cuda": 8192}
QUICK_COPIED, QUICK_MULTIPLIED = 2**24, 512
DEFAULT_CASES = {"cpu": ("embedded:512", "gpt2:32"), "cuda": ("embedded:4096", "gpt2:512", "gpt2-xl:256")}


@dataclass(frozen=True)
class Limits:
    """The most that the device moves and computes: bytes and operations per second."""

    bandwidth: float
    peak: float

    def least(self, moved: float, operations: float) -> float:
        """The least seconds for these bytes and operations."""
        return max(moved / self.bandwidth, operations / self.peak)


def median(step: Callable[[], object], rounds: int) -> float:
    """Median seconds of ``step``, after one warm-up."""
    seconds = []
    for _ in range(rounds + 1):
        settle()
        began = time.perf_counter()
        step()
        settle()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def limits(device: str, dtype: torch.dtype, *, quick: bool) -> Limits:
    """Measure bandwidth and peak rate."""
    import torch

    size, width = (QUICK_COPIED, QUICK_MULTIPLIED) if quick else (COPIED[device], MULTIPLIED[device])
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copying, adding = median(lambda: target.copy_(source), 7), median(source.sum, 7)
    a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
    return Limits(max(2 * size / copying, size / adding), 2 * width**3 / median(lambda: a @ b, 7))


@dataclass(frozen=True)
class Cost:
    """Costs of a model: weights, bytes per weight, and per cached token bytes of cache and operations of attention."""

    weights: int
    element: int
    cache: int
    attention: int

    @classmethod
    def of(cls, model: LanguageModel) -> Cost:
        """From linear layers and a cache in the dtypes of the forward pass."""
        import torch
        from transformers.pytorch_utils import Conv1D

        from tiltlm.lm.precision import cache_dtype

        inner, config = model.model, model.model.config
        layers = [module for module in inner.modules() if isinstance(module, torch.nn.Linear | Conv1D)]
        dtype = model.compute_dtype or inner.dtype
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        cached = 2 * config.num_hidden_layers * key_heads * width
        held = cache_dtype(model.device, model.compute_dtype) or inner.dtype
        return cls(
            weights=sum(layer.weight.numel() for layer in layers),
            element=dtype.itemsize,
            cache=cached * held.itemsize,
            attention=4 * config.num_hidden_layers * heads * width,
        )

    def sampling(self, samples: Samples, limits: Limits) -> float:
        """Least seconds of drawing these samples with their lengths."""
        prompt = samples.prompts.tokens.shape[1]
        total = 0.0
        for t, rows in enumerate(samples.mask.sum(0).tolist()):
            moved = self.weights * self.element + rows * self.cache * (prompt + t)
            total += limits.least(moved, rows * (2 * self.weights + self.attention * (prompt + t)))
        return total

    def scoring(self, samples: Samples, limits: Limits, passes: int) -> float:
        """Least seconds of ``passes`` forward passes over the samples; a backward counts as two."""
        lengths = samples.lengths.double()
        # A token attends to itself and those before it.
        pairs = float((lengths * (lengths + 1) / 2).sum())
        operations = 2 * self.weights * float(lengths.sum()) + self.attention * pairs
        return passes * limits.least(self.weights * self.element, operations)


def score(model: LanguageModel, samples: Samples) -> None:
    """Compute the log-probabilities of the samples."""
    import torch

    with torch.no_grad():
        model.logprob(samples)


def train(model: LanguageModel, samples: Samples) -> None:
    """Compute the gradient of the log-probabilities in chunks, as a training step does."""
    from tiltlm.lm import next_token

    parameters = list(model.model.parameters())
    with model.cast_once():
        for rows in model.chunks(samples):
            chunk = samples.select(rows).trimmed()
            next_token(chunk, model.read(chunk)).policy.sum().backward()
    for parameter in parameters:
        parameter.grad = None


def measured(
    model: LanguageModel, n: int, length: int, limits: Limits, rounds: int
) -> Iterator[tuple[str, float, float]]:
    """For each job its name, tokens per second, and the least time over the measured one."""
    samples = model.sample(n, seed=0, max_completion_length=length)
    tokens, cost = int(samples.mask.sum()), Cost.of(model)
    jobs: dict[str, tuple[Callable[[], object], float]] = {
        "sampling": (
            lambda: model.sample(n, seed=0, max_completion_length=length),
            cost.sampling(samples, limits),
        ),
        "scoring": (lambda: score(model, samples), cost.scoring(samples, limits, 1)),
        "training": (lambda: train(model, samples), cost.scoring(samples, limits, 3)),
    }
    for name, (job, least) in jobs.items():
        seconds = median(job, rounds)
        yield name, tokens / seconds, least / seconds


def main() -> None:
    arguments = parser(__doc__, rounds=5)
    add_device(arguments)
    arguments.add_argument("--dtype", choices=("float32", "auto", "bfloat16"), default="auto", help="(auto)")
    add_cases(arguments)
    args = arguments.parse_args()
    args.case = args.case or [Case.parse(case) for case in DEFAULT_CASES[args.device]]
    if args.quick:
        args.case, args.length, args.rounds = [Case("embedded", 4), Case("tiny", 4)], 5, 1
    from tiltlm.lm import LanguageModel

    command, found = shlex.join(["python", *sys.argv]), {}
    for case in args.case:
        with folder_of(case.model) as folder:
            model = LanguageModel.from_pretrained(folder, device=args.device, dtype=args.dtype)
        dtype = model.compute_dtype or model.model.dtype
        if dtype not in found:
            found[dtype] = limits(args.device, dtype, quick=args.quick)
            at_most = f"{found[dtype].bandwidth / 1e9:,.0f} GB/s, {found[dtype].peak / 1e12:,.2f} Tflop/s in {dtype}"
            print(f"{machine()}: {at_most}", flush=True)
        for name, rate, share in measured(model, case.n, args.length, found[dtype], args.rounds):
            print(
                f"| `{command}` | {name}, {case} of up to {args.length} tokens, {args.dtype} "
                f"| {rate:,.0f} | {share:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
