"""The tables of a study: as data, and from these as Markdown and LaTeX."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tiltlm.reports.summary import Measured, plain_number
from tiltlm.study.record import Study
from tiltlm.study.statistics import BETTER, all_pairs, base_value, best_of, last_values, over_seeds

# Metrics with their titles, in the order shown.
TITLES = {
    "kl_p_pi": "KL(p‖π), nats",
    "moment_error": "Mean distance of moments from their goals",
    "kl_pi_a": "KL(π‖a), nats",
    "distinct_1": "Distinct-1 per text",
    "self_bleu_5": "Self-BLEU-5",
    "entropy": "Entropy, nats per text",
    "perplexity_base": "Perplexity under the base",
}
COMPARED = ("kl_p_pi", "moment_error", "kl_pi_a", "distinct_1", "self_bleu_5")
_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "−": r"$-$",
    "‖": r"$\Vert$",
    "π": r"$\pi$",
    "φ": r"$\varphi$",
    "λ": r"$\lambda$",
    "≤": r"$\le$",
    "–": "--",
    "…": r"\ldots{}",
    "’": "'",
    "k̂": r"$\hat{k}$",
}


@dataclass(frozen=True)
class Cell:
    """A cell's text; ``best`` is shown in bold."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table with its heading and caption; the first column holds names."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def study_tables(study: Study) -> list[Table]:
    """All tables with data."""
    tables: list[Table | None] = [_moments(study, ""), *_by_metric(study, ""), _wins(study), _pairs(study)]
    tables += [_moments(study, "_top_p"), *_by_metric(study, "_top_p"), _references(study), _missing_runs(study)]
    return [_filled(table) for table in tables if table is not None and table.rows]


def markdown(title: str, tables: Sequence[Table]) -> str:
    """All tables in one Markdown file."""
    lines = [f"# {_plain(title)}"]
    for table in tables:
        lines += (
            ["", f"## {_plain(table.title)}", "", _plain(table.note), ""]
            if table.note
            else ["", f"## {table.title}", ""]
        )
        lines.append(f"| {' | '.join(_plain(name) for name in table.columns)} |")
        lines.append(f"| {' | '.join('---' for _ in table.columns)} |")
        for row in table.rows:
            lines.append(f"| {' | '.join(f'**{_plain(c.text)}**' if c.best else _plain(c.text) for c in row)} |")
    return "\n".join(lines) + "\n"


def latex(tables: Sequence[Table]) -> str:
    """All tables in one LaTeX file, for a document with booktabs."""
    parts = ["% Needs \\usepackage{booktabs}; wide tables want \\resizebox or landscape."]
    for table in tables:
        parts += [
            "",
            r"\begin{table}",
            rf"\caption{{{_tex(f'{table.title}. {table.note}'.strip())}}}",
            r"\centering",
            rf"\begin{{tabular}}{{l{'r' * (len(table.columns) - 1)}}}",
            r"\toprule",
            " & ".join(_tex(name) for name in table.columns) + r" \\",
            r"\midrule",
            *(
                " & ".join(rf"\textbf{{{_tex(c.text)}}}" if c.best else _tex(c.text) for c in row) + r" \\"
                for row in table.rows
            ),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    return "\n".join(parts) + "\n"


def _filled(table: Table) -> Table:
    """The same without empty columns, such as those of methods that have not run yet."""
    kept = [i for i in range(len(table.columns)) if any(row[i].text not in ("–", "") for row in table.rows)]
    return replace(table, columns=[table.columns[i] for i in kept], rows=[[row[i] for i in kept] for row in table.rows])


def _by_metric(study: Study, suffix: str) -> Iterator[Table]:
    under = ", top-p sampling" if suffix else ""
    for metric, title in TITLES.items():
        cells = last_values(study, metric + suffix)
        best = best_of(study, metric) if metric in BETTER and not suffix else {}
        rows = []
        for task in study.tasks:
            base = base_value(study, task.name, metric + suffix)
            row = [
                _measured(over_seeds(cells.get((task.name, m.name), {})), m.name in best.get(task.name, []))
                for m in study.methods
            ]
            if any(cell.text != "–" for cell in row):
                rows.append([Cell(task.label), _measured(base), *row])
        yield Table(f"{title}{under}", _how(study, metric), ["task", "base", *(m.label for m in study.methods)], rows)


def _how(study: Study, metric: str) -> str:
    cells = Counter((entry.task, entry.method) for entry in study.entries if entry.status == "done")
    fewest, most = min(cells.values(), default=0), max(cells.values(), default=0)
    means = "One seed ± one standard error"
    if most > 1:
        seeds = f"{most}" if fewest == most else f"{fewest} to {most}"
        means = f"Means over {seeds} seeds ± one standard error over them"
        means += " (with one seed, of its estimate)" if fewest == 1 else ""
    better = {-1: "lower is better", 1: "higher is better"}.get(BETTER.get(metric, 0), "")
    where = ""
    if metric == "kl_p_pi":
        where = (
            ", on one frozen sample of p per task" if study.frozen else ", each on the samples of its own evaluation"
        )
    return f"{means}{where}{'; ' if better else ''}{better}{', best in bold' if better else ''}."


def _moments(study: Study, suffix: str) -> Table:
    rows = []
    for task in study.tasks:
        for name, goal in task.goals.items():
            cells = last_values(study, f"moment{suffix}:{name}")
            row = [_measured(over_seeds(cells.get((task.name, method.name), {}))) for method in study.methods]
            if any(cell.text != "–" for cell in row):
                base = _measured(base_value(study, task.name, f"moment{suffix}:{name}"))
                shown = task.label if len(task.goals) == 1 else f"{task.label}: {name}"
                rows.append([Cell(shown), Cell("–" if goal is None else plain_number(goal)), base, *row])
    under = ", top-p sampling" if suffix else ""
    columns = ["task", "goal", "base", *(method.label for method in study.methods)]
    return Table(f"Moments, E_π[φ]{under}", _how(study, ""), columns, rows)


def _wins(study: Study) -> Table:
    """The number of tasks on which each method is the best."""
    metrics = [metric for metric in COMPARED if best_of(study, metric)]
    best = {metric: best_of(study, metric) for metric in metrics}
    cells = {metric: last_values(study, metric) for metric in metrics}
    rows = []
    for method in study.methods:
        won = [sum(method.name in names for names in best[metric].values()) for metric in metrics]
        ran = [sum((task, method.name) in cells[metric] for task in best[metric]) for metric in metrics]
        if any(ran):
            rows.append([Cell(method.label), *(Cell(f"{a} of {b}") for a, b in zip(won, ran, strict=True))])
    note = "By the mean over seeds. The total counts tasks on which the method and another one ran."
    return Table("Tasks on which a method is best", note, ["method", *(TITLES[metric] for metric in metrics)], rows)


def _pairs(study: Study) -> Table:
    labels = {method.name: method.label for method in study.methods}
    rows = [
        [
            Cell(f"{labels[one.first]} − {labels[one.second]}"),
            Cell(TITLES[metric]),
            _measured(one.difference),
            Cell(f"{one.won} to {one.lost} of {one.tasks}"),
            Cell(f"{one.clearly_won} to {one.clearly_lost}"),
            Cell("–" if one.p is None else f"{one.p:.2g}"),
        ]
        for metric in ("kl_p_pi", "moment_error", "kl_pi_a")
        for one in all_pairs(study, metric)
    ]
    note = (
        "Differences on the same tasks and seeds, mean over tasks ± one standard error over tasks. Won: the number of "
        "tasks on which the first is better, to the number on which the second is. Clearly: tasks whose difference "
        "exceeds two standard errors over seeds. p: Wilcoxon’s signed-rank test over tasks (with one task, a paired "
        "t-test over its seeds), two-sided, not corrected for multiple tests."
    )
    return Table(
        "Differences between methods", note, ["first − second", "metric", "difference", "won", "clearly", "p"], rows
    )


def _references(study: Study) -> Table | None:
    rows = []
    for task in study.tasks:
        found = task.reference
        if found is not None:
            target, k = found["target"], found.get("pareto_k")
            goals = ", ".join(
                f"{one['name']} {plain_number(1.0 if one['kind'] == 'filter' else one['goal'])}"
                if one["kind"] != "reward"
                else one["name"]
                for one in target["features"]
            )
            base = ", ".join(_short(Measured.read(one["base"])) for one in target["features"])
            shown = [
                goals,
                base,
                found["proposal"],
                f"{found['hits']:,} of {found['samples']:,}",
                f"{found['ess']:,.0f}",
                "–" if k is None else f"{k:.2f} (≤ {found['pareto_k_threshold']:.2f})",
                str(Measured.read(found["kl_p_a"])),
            ]
            rows.append([Cell(task.label), *map(Cell, shown)])
    note = (
        "One weighted sample of p per task, drawn once; KL(p‖π) of all runs of the task is measured on it. k̂ should be "
        "below the number in brackets; – if all weights are equal, as with filters, or too few."
    )
    columns = ["task", "goal", "under the base", "drawn from", "in p’s support", "ESS", "k̂", "KL(p‖a), nats"]
    return Table("The frozen references", note, columns, rows)


def _missing_runs(study: Study) -> Table:
    """One row for all tasks of a method with the same missing runs."""
    missing = {(one["method"], one["task"], "skipped", one["reason"]): ["all"] for one in study.skipped}
    for e in study.entries:
        if e.status != "done":
            missing.setdefault((e.method, e.task, e.status, e.error or ""), []).append(str(e.seed))
    alike: dict[tuple[str, str, str, str], list[str]] = {}
    for (method, task, state, why), seeds in missing.items():
        alike.setdefault((method, ", ".join(seeds), state, why), []).append(task)
    methods = {method.name: method.label for method in study.methods}
    tasks = {task.name: task.label for task in study.tasks}
    order = list(methods)
    rows = [
        [
            Cell(methods[method]),
            Cell("all" if len(names) == len(tasks) > 1 else ", ".join(tasks[name] for name in names)),
            Cell(seeds),
            Cell(state),
            Cell(why),
        ]
        for (method, seeds, state, why), names in sorted(alike.items(), key=lambda one: order.index(one[0][0]))
    ]
    return Table("Missing runs", "", ["method", "tasks", "seeds", "status", "reason"], rows)


def _measured(value: Measured, best: bool = False) -> Cell:
    return Cell(str(value), best and value.known)


def _short(value: Measured) -> str:
    return "–" if not math.isfinite(value.value) else f"{value.value:.3g}"


def _plain(text: Any) -> str:
    """Text that neither ends a cell of a Markdown table nor is interpreted as HTML."""
    shown = str(text).replace("|", "\\|").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(shown.split())


def _tex(text: str) -> str:
    # One character at a time, so that no replacement is replaced again; k̂ is two characters.
    parts = text.replace("k̂", "\0")
    return " ".join("".join(_LATEX["k̂"] if c == "\0" else _LATEX.get(c, c) for c in parts).split())
