"""The report of a run: one self-contained HTML file made from the run directory alone, without any model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiltlm.reports.charts import distance_charts, how_to_read, moment_charts
from tiltlm.reports.plots import PALETTE_SIZE, compact_count
from tiltlm.reports.samples_view import pair_samples
from tiltlm.reports.summary import MET_WITHIN, FeatureSummary, Measured, plain_number, summarize
from tiltlm.runs import storage
from tiltlm.runs.directory import RUN_FIELDS, RunDirectory

if TYPE_CHECKING:
    import jinja2

PROGRESS = ("step", "max_steps", "sequences", "forward_passes", "passes_per_token")
MOST_SAMPLES = 40
SAMPLES_AT_FIRST = 10

_PHASES = {
    "sample": "sampling",
    "features": "measuring features",
    "base": "scoring under the base",
    "policy": "scoring under the policy, with gradient",
    "step": "optimizer step",
}

_PRESERVED = {
    "entropy": ("Entropy", "nats per text; falls when texts become less varied"),
    "distinct_1": ("Distinct-1", "share of distinct tokens in a text; falls when texts repeat themselves"),
    "distinct_1_corpus": ("Distinct-1, all texts", "share of distinct tokens in all texts together"),
    "self_bleu_5": ("Self-BLEU-5", "similarity of the texts to each other, from 0 to 1; rises when they become alike"),
    "perplexity_base": ("Perplexity under the base", "per token; rises when texts become less likely under the base"),
}


@dataclass(frozen=True)
class Strip:
    """A feature's values on a line, positions in percent of the line's length; None for nothing to mark."""

    base: float | None
    goal: float | None
    tuned: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Phase:
    """The seconds of one part of the work, and its share of the total in percent."""

    name: str
    seconds: float
    share: float


@dataclass(frozen=True)
class Preserved:
    """A property of the texts that should not change."""

    name: str
    meaning: str
    base: Measured
    tuned: Measured
    change: str


@dataclass(frozen=True)
class PromptRow:
    """One of several prompts: each feature's mean under base and tuned model, and its distance from the target."""

    prompt: str
    base: Sequence[Measured]
    tuned: Sequence[Measured]
    kl: Measured
    tv: Measured


def write_report(run_dir: str | Path | RunDirectory) -> Path:
    """Write ``report.html`` into the directory of a run in any state, and return its path.

    Raises UsageError without a run, CheckpointError if its files are broken or the report cannot be written.
    """
    run = run_dir if isinstance(run_dir, RunDirectory) else RunDirectory.open(run_dir)
    html = render_report(run.path.resolve().name, run.read_run(), run.read_metrics(), run.read_samples())
    # A lone surrogate becomes a question mark: it cannot be encoded.
    storage.write_atomically(run.report_path, html.encode("utf-8", errors="replace"))
    return run.report_path


def render_report(
    name: str, run: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]
) -> str:
    """The report's HTML from the directory's name and the contents of run.json, metrics.jsonl and samples.jsonl."""
    import yaml

    summary = summarize(run, metrics)
    evaluation = run.get("evaluation") or {}
    colors = {feature.name: feature.index % PALETTE_SIZE for feature in summary.features}
    batch_size = Measured.read(((run.get("config") or {}).get("training") or {}).get("batch_size")).value
    moments = moment_charts(summary, metrics)
    distances = distance_charts(summary, metrics, evaluation.get("base") or {}, batch_size)
    environment = templates()
    environment.filters |= {"number": plain_number, "duration": duration, "count": compact_count}
    environment.tests["finite"] = math.isfinite
    return environment.get_template("report.html.j2").render(
        name=name,
        run=dict.fromkeys(RUN_FIELDS) | dict(run),
        progress=dict.fromkeys(PROGRESS) | (run.get("progress") or {}),
        summary=summary,
        met_within=MET_WITHIN,
        has_top_p=any(feature.top_p.known for feature in summary.features),
        colors=colors,
        strips=_strips(summary.features),
        moment_charts=moments,
        distance_charts=distances,
        how_to_read=how_to_read([*moments, *distances], summary, metrics),
        phases=_phases(metrics, Measured.read(run.get("seconds")).value),
        preserved=_preserved(evaluation),
        prompts=_prompts(evaluation, [feature.name for feature in summary.features]),
        prompts_in_all=(evaluation.get("policy") or {}).get("prompts") or 0,
        pairs=pair_samples(samples, MOST_SAMPLES),
        sample_counts={model: sum(one.get("model") == model for one in samples) for model in ("base", "policy")},
        at_first=SAMPLES_AT_FIRST,
        config=yaml.safe_dump(run.get("config") or {}, sort_keys=False, allow_unicode=True, width=100),
    )


def templates() -> jinja2.Environment:
    """The templates of pages: all text in them is escaped; an undefined name is an error."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def duration(seconds: float) -> str:
    """A time in words: 8.4 s, 4 min 12 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _strips(features: Sequence[FeatureSummary]) -> list[Strip]:
    """Shares on one common scale from zero, so that they can be compared; other features each on its own scale."""
    highest = max([x for feature in features if feature.in_unit_interval for x in _means(feature)], default=1.0)
    return [
        _strip(feature, 0.0, 1.15 * highest) if feature.in_unit_interval else _own_strip(feature)
        for feature in features
    ]


def _means(feature: FeatureSummary) -> list[float]:
    reach = 2 * feature.tuned.se if math.isfinite(feature.tuned.se) else 0.0
    candidates = [feature.base.value, feature.aim, feature.tuned.value - reach, feature.tuned.value + reach]
    return [x for x in candidates if math.isfinite(x)]


def _own_strip(feature: FeatureSummary) -> Strip:
    means = _means(feature) or [0.0]
    margin = 0.15 * (max(means) - min(means)) or 1.0
    return _strip(feature, min(means) - margin, max(means) + margin)


def _strip(feature: FeatureSummary, low: float, high: float) -> Strip:
    def position(x: float) -> float | None:
        return round(100 * min(max((x - low) / (high - low), 0.0), 1.0), 2) if math.isfinite(x) and high > low else None

    reach = 2 * feature.tuned.se
    return Strip(
        base=position(feature.base.value),
        goal=position(feature.aim),
        tuned=position(feature.tuned.value),
        low=position(feature.tuned.value - reach),
        high=position(feature.tuned.value + reach),
    )


def _phases(metrics: Sequence[Mapping[str, Any]], total: float) -> list[Phase]:
    """Seconds by phase over all steps, and the remaining time."""
    seconds: dict[str, float] = {}
    for record in metrics:
        for phase, spent in (record.get("seconds") or {}).items():
            seconds[phase] = seconds.get(phase, 0.0) + (Measured.read(spent).value if spent is not None else 0.0)
    named = {_PHASES.get(phase, phase): spent for phase, spent in seconds.items() if spent > 0}
    rest = total - sum(named.values()) if math.isfinite(total) else 0.0
    if rest > 0:
        named["estimates and saving"] = rest
    whole = sum(named.values())
    return [Phase(phase, spent, 100 * spent / whole) for phase, spent in named.items()]


def _prompts(evaluation: Mapping[str, Any], names: Sequence[str]) -> list[PromptRow]:
    base, tuned = ((evaluation.get(model) or {}).get("per_prompt") or [] for model in ("base", "policy"))
    before = {one["prompt"]: one for one in base}
    return [
        PromptRow(
            str(one["prompt"] or ""),
            [Measured.read(before.get(one["prompt"], {}).get("moments", {}).get(name)) for name in names],
            [Measured.read(one["moments"].get(name)) for name in names],
            Measured.read(one["kl_p_pi"]),
            Measured.read(one["tv_p_pi"]),
        )
        for one in tuned
    ]


def _preserved(evaluation: Mapping[str, Any]) -> list[Preserved]:
    rows = []
    for key, (title, meaning) in _PRESERVED.items():
        base, tuned = (Measured.read((evaluation.get(model) or {}).get(key)) for model in ("base", "policy"))
        if base.known or tuned.known:
            rows.append(Preserved(title, meaning, base, tuned, _change(base, tuned)))
    return rows


def _change(base: Measured, tuned: Measured) -> str:
    """The relative change in percent, with the standard error of a ratio of independent estimates (delta method)."""
    if not (base.known and tuned.known and base.value and tuned.value):
        return "–"
    ratio = tuned.value / base.value
    se = abs(ratio) * math.hypot(tuned.se / tuned.value, base.se / base.value)
    return f"{'+' if ratio >= 1 else ''}{Measured(100 * (ratio - 1), 100 * se)} %"
