"""KL(p‖π), exact, against sequences drawn and forward passes: the methods at their best learning rate on small worlds.

    python benchmarks/estimators.py [--seeds 5] [--only "gdc++ on-policy" "guided, correction 1"] [--all]
        [--target moment] [--rates 0.001 0.01] [--each-seed] [--quick] [--jobs 2]

KL(p‖π) is exact. On four targets a policy writes six tokens of a vocabulary of five, and all 15,625 sequences are
enumerated. On ``pointwise-5`` it writes forty tokens of a vocabulary of fifty, and sums over all sequences are computed
over the few states that a prefix can have. Every drawn sequence counts, those of the fit included, and so does every
forward pass as the library counts it. A method's learning rate is the one of the grid with the smallest mean KL(p‖π) at
10,000 sequences.
"""

from __future__ import annotations

import argparse
import math
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from ground.distilled import Distilled
from ground.pooled import FromPool
from ground.runs import Budget, Runs
from ground.sampled import Sampled
from ground.worlds import World, enumerable, rare_phrase
from torch import Tensor

from tiltlm.objectives import (
    DPG,
    FDPG,
    GDC,
    AlphaDPG,
    BRAIn,
    GDCPlusPlus,
    Guided,
    KLControl,
    Pooled,
    Reinforce,
    VarGrad,
)

TARGETS = ("pointwise-2", "pointwise-3", "pointwise-5", "moment", "hybrid")
RATES = [1e-3, 3e-3, 1e-2, 3e-2]
FIT = 2000
BUDGET = Budget(10_000, 20_000)
SEQUENCES, PASSES = (2_500, 5_000, 10_000), (10_000, 20_000)

METHODS: dict[str, Sampled | Distilled | FromPool] = {
    "gdc++ published": Sampled(GDCPlusPlus(), "published"),
    "gdc++ on-policy": Sampled(GDCPlusPlus()),
    "gdc++ on-policy, fit reused": Sampled(GDCPlusPlus(), reuse=True),
    "gdc++ on-policy, 4 steps": Sampled(GDCPlusPlus(), steps=4),
    "gdc++, pool, 4 steps": FromPool(GDCPlusPlus()),
    "gdc++, pool, 12 steps": FromPool(GDCPlusPlus(), steps=12),
    "pooled, 4 steps": FromPool(Pooled()),
    "pooled, 12 steps": FromPool(Pooled(), steps=12),
    "dpg on-policy": Sampled(DPG()),
    "gdc, q follows by KL": Sampled(GDC(), "kl"),
    "f_dpg js": Sampled(FDPG(divergence="js")),
    "alpha_dpg 0.5": Sampled(AlphaDPG(alpha=0.5)),
    "brain": Sampled(BRAIn()),
    "vargrad": Sampled(VarGrad()),
    "reinforce": Sampled(Reinforce()),
    "kl_control, beta 1": Sampled(KLControl(beta=1.0)),
    "guided, correction 1": Distilled(Guided()),
    "guided, correction 0": Distilled(Guided(correction=0.0)),
    "guided, pool, 4 steps": Distilled(Guided(), steps=4),
    "guided, pool, 12 steps": Distilled(Guided(), steps=12),
    "gdc++ on-policy, batches of 50": Sampled(GDCPlusPlus(), batch=50),
    "gdc++ on-policy, batches of 50, rate falls": Sampled(GDCPlusPlus(), batch=50, falls="passes"),
    "guide kept, gdc++": Sampled(GDCPlusPlus(), reuse=True, keeps_guide=True),
    "guide kept, gdc++, batches of 50": Sampled(GDCPlusPlus(), reuse=True, batch=50, keeps_guide=True),
    "guide kept, gdc++, batches of 50, rate falls": Sampled(
        GDCPlusPlus(), reuse=True, batch=50, falls="passes", keeps_guide=True
    ),
    "guide kept, guided, batches of 50, rate falls": Distilled(Guided(), batch=50, falls="passes", keeps_guide=True),
    "guide kept, pooled, 4 steps, rate falls": FromPool(Pooled(), falls="sequences", keeps_guide=True),
    "guide kept, pooled, 12 steps, rate falls": FromPool(Pooled(), steps=12, falls="sequences", keeps_guide=True),
    "gdc++ on-policy, rate falls": Sampled(GDCPlusPlus(), falls="sequences"),
    "guided, pool, 12 steps, rate falls": Distilled(Guided(), steps=12, falls="sequences"),
    "guided, pool, 36 steps, rate falls": Distilled(Guided(), steps=36, falls="sequences"),
}
# Methods with many updates, run only if named or with --all, so that a default run takes ten minutes.
LONG = (
    "gdc++ on-policy, 4 steps",
    "gdc++ on-policy, rate falls",
    "gdc++, pool, 4 steps",
    "gdc++, pool, 12 steps",
    "pooled, 4 steps",
    "pooled, 12 steps",
    "guided, pool, 4 steps",
    "gdc++ on-policy, batches of 50",
    "guide kept, gdc++, batches of 50",
    "guide kept, gdc++, batches of 50, rate falls",
    "guide kept, pooled, 4 steps, rate falls",
    "guide kept, pooled, 12 steps, rate falls",
    "guided, pool, 12 steps, rate falls",
    "guided, pool, 36 steps, rate falls",
)
# VarGrad needs a finite log P, and KL control's optimum a·exp(reward) is p only without filters.
MOMENTS_ALONE = ("vargrad", "kl_control, beta 1")
# REINFORCE maximizes the reward, which does not fit a target that constrains a share of the texts.
FILTERS_ALONE = ("reinforce",)


def applies(method: str, world: World) -> bool:
    """Whether the method is meant for targets of this kind."""
    if method in MOMENTS_ALONE:
        return len(world.moments) == len(world.terms)
    return method not in FILTERS_ALONE or not world.moments


def trained(
    method: Sampled | Distilled | FromPool, world: World, seeds: int, rates: list[float], budget: Budget
) -> Runs:
    """Train all seeds at all learning rates; fit samples are drawn only if target or method uses them."""
    needs_fit = bool(world.moments) or isinstance(method, Distilled | FromPool) or method.reuse or method.keeps_guide
    runs = Runs(world, seeds, rates, FIT if needs_fit else 0)
    method.train(runs, budget)
    return runs


def fit_hits(world: World, seeds: int) -> list[int]:
    """The number of fit samples with P > 0, by seed."""
    runs = Runs(world, seeds, RATES[:1], FIT)
    assert runs.fit_sample is not None
    hits: list[int] = runs.score(runs.fit_sample).possible.sum(1).tolist()
    return hits


def kl_by(runs: Runs, *, sequences: float = math.inf, passes: float = math.inf) -> Tensor:
    """KL(p‖π) [seeds, rates] at the last point of each run within these budgets; of the base before any update."""
    found = runs.curve[0].kl
    for point in runs.curve:
        within = (point.passes <= passes) & (point.sequences <= sequences)
        found = torch.where(within, point.kl, found)
    return found.reshape(runs.seeds, -1)


def cell(values: Tensor, each_seed: bool) -> str:
    """The mean over seeds ± its standard error, or the values of all seeds."""
    if each_seed:
        return ", ".join(f"{value:.3f}" for value in values.tolist())
    if not bool(values.isfinite().all()):
        return "fails"
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{float(values.mean()):.3f} ± {error:.3f}"


def row(name: str, runs: Runs, rates: list[float], each_seed: bool) -> str:
    """The row of a method, at its best learning rate."""
    best = int(kl_by(runs, sequences=SEQUENCES[-1]).mean(0).argmin())
    cells = [cell(kl_by(runs, sequences=n)[:, best], each_seed) for n in SEQUENCES]
    cells += [cell(kl_by(runs, passes=n)[:, best], each_seed) for n in PASSES]
    return " | ".join(["", name, f"{rates[best]:g}", *cells, ""]).strip()


def table(target: str, methods: list[str], seeds: int, rates: list[float], each_seed: bool) -> str:
    """The table of a target, computed on one core."""
    torch.set_num_threads(1)
    world = rare_phrase() if target == "pointwise-5" else enumerable(target)
    terms = ", ".join(f"{term.feature.name} ({term.kind})" for term in world.terms)
    base = float(world.kl(world.base[None])[0])
    hits = ", ".join(map(str, fit_hits(world, seeds)))
    heads = [f"{n:,} sequences" for n in SEQUENCES] + [f"{n:,} passes" for n in PASSES]
    lines = [
        f"\n**{target}**: {terms}; log Z = {world.log_z:.2f}, KL(p‖a) = {base:.3f}, P > 0 in {hits} of {FIT:,}\n",
        " | ".join(["", "method", "learning rate", *heads, ""]).strip(),
        "| --- " * (2 + len(heads)) + "|",
    ]
    for name in methods:
        if applies(name, world):
            lines.append(row(name, trained(METHODS[name], world, seeds, rates, BUDGET), rates, each_seed))
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seeds", type=int, default=5)
    arguments.add_argument("--only", nargs="+", choices=METHODS, metavar="METHOD", help="these methods alone")
    arguments.add_argument("--all", action="store_true", help="also the methods that take long")
    arguments.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    arguments.add_argument("--rates", nargs="+", type=float, default=RATES, help="the grid of learning rates")
    arguments.add_argument("--each-seed", action="store_true", help="every seed's KL(p‖π) instead of mean and error")
    arguments.add_argument("--quick", action="store_true", help="two seeds, one learning rate")
    arguments.add_argument("--jobs", type=int, default=2, help="targets at a time, one core each")
    args = arguments.parse_args()
    seeds, rates = (2, [1e-2]) if args.quick else (args.seeds, args.rates)
    methods = args.only or [name for name in METHODS if args.all or name not in LONG]
    began = time.monotonic()
    # Processes are spawned, since forked ones may hang in the threads of their parent.
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        # The target that takes longest is started first.
        tables = {
            target: pool.submit(table, target, methods, seeds, rates, args.each_seed)
            for target in sorted(args.target, key="pointwise-5".__ne__)
        }
        for target in args.target:
            print(tables[target].result(), flush=True)
    grid = ", ".join(f"{rate:g}" for rate in rates)
    print(f"\n{seeds} seeds, learning rates {grid}, {args.jobs} at once, {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
