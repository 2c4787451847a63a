"""Statistics over the runs of a study: means over seeds, paired differences between methods, tasks won."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from tiltlm.reports.summary import Measured
from tiltlm.study.record import Study

# The better direction: −1 lower, +1 higher. Entropy has none; it is compared with the base's.
BETTER = {"kl_p_pi": -1, "moment_error": -1, "kl_pi_a": -1, "distinct_1": 1, "self_bleu_5": -1, "perplexity_base": -1}
CLEAR = 2.0

Cells = dict[tuple[str, str], dict[int, Measured]]


@dataclass(frozen=True)
class Paired:
    """Method ``first`` less ``second``: the mean difference over tasks, and how many tasks each wins.

    ``clear`` counts those where the difference is beyond two standard errors over seeds. ``p`` is two-sided: Wilcoxon's
    signed-rank test over tasks or, with one task, the paired t-test over seeds; None with too few of either.
    """

    first: str
    second: str
    metric: str
    difference: Measured
    tasks: int
    won: int
    lost: int
    clearly_won: int
    clearly_lost: int
    p: float | None


def last_values(study: Study, metric: str) -> Cells:
    """The value at the end of each run, by task and method, then by seed."""
    cells: Cells = {}
    for (task, method, measured), rows in study.ends.items():
        known = {seed: Measured(row.value, row.se) for seed, row in rows.items() if math.isfinite(row.value)}
        if measured == metric and known:
            cells[task, method] = known
    return cells


def base_value(study: Study, task: str, metric: str) -> Measured:
    """The base's value, a mean over the runs of a task that hold one."""
    rows = [row for m in study.methods for row in study.series.get((task, m.name, metric), [])]
    known = [Measured(row.value, row.se) for row in rows if row.sequences == 0]
    # They use the same samples of the base, so several are no better than one.
    return Measured(fmean(one.value for one in known), known[0].se) if known else Measured()


def over_seeds(values: Mapping[int, Measured]) -> Measured:
    """The mean over seeds with its standard error; with one seed, that of its own estimate."""
    known = [one for one in values.values() if one.known]
    if len(known) < 2:
        return known[0] if known else Measured()
    numbers = [one.value for one in known]
    return Measured(fmean(numbers), stdev(numbers) / math.sqrt(len(numbers)))


def best_of(study: Study, metric: str) -> dict[str, list[str]]:
    """The methods that are best on each task by their mean over seeds, among tasks with several methods."""
    cells, sign = last_values(study, metric), BETTER[metric]
    best: dict[str, list[str]] = {}
    for task in study.tasks:
        means = {m.name: over_seeds(cells[task.name, m.name]) for m in study.methods if (task.name, m.name) in cells}
        if len(means) > 1:
            top = max(sign * one.value for one in means.values())
            best[task.name] = [name for name, one in means.items() if sign * one.value == top]
    return best


def paired(study: Study, metric: str, first: str, second: str) -> Paired | None:
    """The difference between two methods on the tasks and seeds that both have; None without any."""
    cells, sign = last_values(study, metric), BETTER[metric]
    by_task: list[Measured] = []
    alone: list[tuple[float, float]] = []
    for task in study.tasks:
        one, other = cells.get((task.name, first), {}), cells.get((task.name, second), {})
        pairs = [(one[seed].value, other[seed].value) for seed in one if seed in other]
        if pairs:
            gaps = [a - b for a, b in pairs]
            error = stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
            by_task.append(Measured(fmean(gaps), error))
            alone = pairs
    if not by_task:
        return None
    gaps = [one.value for one in by_task]
    clear = [one for one in by_task if abs(one.value) > CLEAR * one.se]
    error = stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else by_task[0].se
    return Paired(
        first,
        second,
        metric,
        Measured(fmean(gaps), error),
        len(gaps),
        won=sum(sign * gap > 0 for gap in gaps),
        lost=sum(sign * gap < 0 for gap in gaps),
        clearly_won=sum(sign * one.value > 0 for one in clear),
        clearly_lost=sum(sign * one.value < 0 for one in clear),
        p=_wilcoxon(gaps) if len(gaps) > 1 else _t_test(alone),
    )


def all_pairs(study: Study, metric: str) -> list[Paired]:
    """Every two methods, in the order of the study; for variants of several batch sizes, pairs of one size."""
    pairs = itertools.combinations(study.methods, 2)
    alike = [(a.name, b.name) for a, b in pairs if None in (a.batch_size, b.batch_size) or a.batch_size == b.batch_size]
    return [found for a, b in alike if (found := paired(study, metric, a, b)) is not None]


def _wilcoxon(gaps: Sequence[float]) -> float | None:
    from scipy import stats

    moved = [gap for gap in gaps if gap != 0]
    return float(stats.wilcoxon(moved).pvalue) if moved else None


def _t_test(pairs: Sequence[tuple[float, float]]) -> float | None:
    from scipy import stats

    gaps = [a - b for a, b in pairs]
    # Without variance there is no t statistic: the runs are equal, or differ by a constant.
    if len(gaps) < 2 or max(gaps) == min(gaps):
        return None
    return float(stats.ttest_1samp(gaps, 0.0).pvalue)
