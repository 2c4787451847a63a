"""Tables for the terminal, from the records of a run; loads no model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from tiltlm.reports.summary import prompts_in_words

# Keys of an evaluation with their titles, in the order shown.
FIGURES = {
    "kl_p_pi": "KL(p‖π), nats",
    "kl_pi_a": "KL(π‖a), nats",
    "tv_p_pi": "TV(p, π)",
    "log_z": "log Z",
    "ess": "ESS, samples",
    "entropy": "entropy, nats per text",
    "perplexity_base": "perplexity under the base",
    "distinct_1": "Distinct-1 per text",
    "distinct_1_corpus": "Distinct-1 of all texts",
    "self_bleu_5": "Self-BLEU-5",
}


def fit_table(record: Mapping[str, Any]) -> Table:
    """The fitted target: each feature under the base and under p, and its coefficient."""
    table = Table(box=None, pad_edge=False)
    for column in ("feature", "kind", "goal", "base", "under p", "λ"):
        table.add_column(column, justify="left" if column in ("feature", "kind") else "right")
    for entry in record["features"]:
        coefficient = estimate(entry["coefficient"]) if entry["coefficient"] else "filter"
        goal = "" if entry["goal"] is None else f"{entry['goal']:g}"
        table.add_row(
            entry["name"], entry["kind"], goal, estimate(entry["base"]), estimate(entry["achieved"]), coefficient
        )
    table.add_section()
    table.add_row("log Z", "", "", "", estimate(record["log_z"]), "")
    table.add_row(f"ESS of {record['samples']:,} samples", "", "", "", estimate(record["ess"]), "")
    table.add_row("KL(p‖a), nats", "", "", "", estimate(record["kl_p_a"]), "")
    return table


def evaluation_table(record: Mapping[str, Any]) -> Table:
    """One evaluation, a figure a row."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, value in record["moments"].items():
        table.add_row(name, estimate(value))
    for name, value in record["moments_top_p"].items():
        table.add_row(f"{name}, top-p", estimate(value))
    for key, title in FIGURES.items():
        if record[key] is not None:
            table.add_row(title, estimate(record[key]))
    prompts = prompts_in_words(record)
    table.add_row("samples", f"{record['samples']:,}" + (f" on {prompts}" if prompts else ""))
    return table


def run_table(record: Mapping[str, Any]) -> Table:
    """A finished run: goals, base and tuned model side by side."""
    base, policy = record["evaluation"]["base"], record["evaluation"]["policy"]
    goals = {entry["name"]: entry["goal"] for entry in record["target"]["features"]}
    table = Table(box=None, pad_edge=False)
    for column in ("", "goal", "base", "tuned"):
        table.add_column(column, justify="left" if not column else "right")
    for name, goal in goals.items():
        shown = "" if goal is None else f"{goal:g}"
        table.add_row(name, shown, estimate(base["moments"][name]), estimate(policy["moments"][name]))
    for key in ("kl_p_pi", "kl_pi_a", "tv_p_pi", "distinct_1", "self_bleu_5"):
        table.add_row(FIGURES[key], "", estimate(base[key]), estimate(policy[key]))
    return table


def estimate(value: Mapping[str, float | None]) -> str:
    """An estimate with the digits that its error supports."""
    number, error = value["value"], value["se"]
    if number is None:
        return "unknown"
    if error is None or error == 0:
        return f"{number:.4g}"
    digits = max(0, min(6, 1 - int(f"{error:e}".split("e")[1])))
    return f"{number:.{digits}f} ± {error:.{digits}f}"
