"""The time of a step of tiltlm by kernel, and the least time that its matrix products could take on this machine.

    python benchmarks/profile_step.py [--case embedded:512 gpt2:32] [--dtype auto]

The least time is the step's operations (2 per weight of a linear layer and token; one pass for sampling, one of the
base, three of the policy with its gradient) at the rate of one large product, measured in the same process. Sampling a
few rows cannot reach it: it loads all weights for each token, and memory bandwidth limits that.
"""

from __future__ import annotations

import time

import torch
from models import Case, add_cases, folder_of
from side_by_side import add_dtype, machine, parser
from torch.profiler import ProfilerActivity, profile

# Rows and columns of the large product.
LARGE = 2048
PASSES = 5
KERNELS = 14


def product_rate(dtype: torch.dtype) -> float:
    """Multiplications and additions per second of one large product."""
    a, b = (torch.randn(LARGE, LARGE).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(7):
        began = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - began)
    return 2 * LARGE**3 / sorted(seconds)[3]


def main() -> None:
    arguments = parser(__doc__, rounds=3)
    add_dtype(arguments)
    add_cases(arguments, "embedded:512", "gpt2:32")
    args = arguments.parse_args()
    if args.quick:
        args.case, args.length, args.rounds = [Case("tiny", 8)], 5, 1
    from sides import our_trainer

    print(machine())
    for case in args.case:
        with folder_of(case.model) as folder:
            trainer = our_trainer(folder, batch=case.n, length=args.length, dtype=args.dtype)
            for _ in range(args.rounds):
                before, began = trainer.counter.trained, time.perf_counter()
                metrics = trainer.train_step()
                seconds, tokens = time.perf_counter() - began, trainer.counter.trained - before
            with profile(activities=[ProfilerActivity.CPU]) as kernels:
                trainer.train_step()
        model = trainer.roles.policy
        weights = sum(p.numel() for p in model.model.parameters() if p.ndim == 2)
        floor = 2 * weights * tokens * PASSES / product_rate(model.compute_dtype or torch.float32)
        phases = ", ".join(f"{name} {value:.2f}" for name, value in (metrics.seconds or {}).items())
        print(f"\n{case}, {args.dtype}: {seconds:.2f} s ({phases}); its products alone, at full rate: {floor:.2f} s")
        rows = sorted(kernels.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in rows)
        for event in rows[:KERNELS]:
            print(f"  {event.self_cpu_time_total / total:6.1%}  {event.key} x {event.count}")


if __name__ == "__main__":
    main()
