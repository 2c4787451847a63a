"""Means, differences, tables, figures and the page of a study, from hand-made rows."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from xml.etree import ElementTree

import pytest
from scipy import stats

from synthetic_run import write_synthetic_run
from tiltlm.errors import UsageError
from tiltlm.reports.summary import Measured
from tiltlm.study.of_runs import study_of_runs
from tiltlm.study.record import Entry, Row, Study, StudyDirectory, StudyMethod, StudyTask
from tiltlm.study.report.drawing import StudyFigure, method_styles
from tiltlm.study.report.figures import study_figures
from tiltlm.study.report.page import render_page
from tiltlm.study.report.tables import latex, markdown, study_tables
from tiltlm.study.report.write import write_study
from tiltlm.study.rows import read_study, write_results
from tiltlm.study.statistics import all_pairs, best_of, last_values, over_seeds, paired

HOSTILE = '<img src=x onerror="alert(1)"> & 50% of_$it | {all}'
# KL(p‖π) at the end, by task and method, for the seeds 0, 1, 2.
KL = {
    ("t1", "m1"): (0.30, 0.32, 0.34),
    ("t1", "m2"): (0.40, 0.41, 0.45),
    ("t2", "m1"): (1.00, 1.10, 1.20),
    ("t2", "m2"): (1.05, 1.05, 1.05),
    ("t3", "m1"): (2.0, 2.1, 2.2),
    ("t3", "m2"): (1.0, 1.1, 1.2),
}


def small_study(title: str = "A study", label: str = "Method 1") -> Study:
    tasks = [StudyTask(name, f"Task {name}", {"female": 0.5}) for name in ("t1", "t2", "t3")]
    methods = [StudyMethod("m1", label, "m1"), StudyMethod("m2", "Method 2", "m2")]
    rows, entries = [], []
    for (task, method), values in KL.items():
        for seed, end in enumerate(values):
            entries.append(Entry(task, method, seed, "done"))
            for sequences, kl in ((0, 3.0), (500, 2.5), (1000, end)):
                at = (task, method, seed, sequences, 3 * sequences)
                rows.append(Row(*at, "kl_p_pi", kl, 0.01))
                rows.append(Row(*at, "moment:female", 0.5 - kl / 10, 0.02))
                rows.append(Row(*at, "moment_error", kl / 10, 0.02))
                rows.append(Row(*at, "kl_pi_a", 3.0 - kl, math.nan))
                rows.append(Row(*at, "self_bleu_5", 0.1 + kl / 100, 0.01))
    return Study(title, tasks, methods, entries, rows)


def test_means_and_errors_are_over_seeds() -> None:
    cell = last_values(small_study(), "kl_p_pi")["t1", "m1"]
    found = over_seeds(cell)
    assert found.value == pytest.approx(0.32)
    assert found.se == pytest.approx(0.02 / math.sqrt(3))
    assert over_seeds({4: Measured(1.5, 0.25)}) == Measured(1.5, 0.25)
    assert not over_seeds({}).known


def test_an_unfinished_study_shows_its_values_and_its_missing_runs() -> None:
    study = small_study()
    waiting = [Entry(task, "m3", seed, "waiting") for task in ("t1", "t2", "t3") for seed in (0, 1, 2)]
    failed = Entry("t1", "m2", 2, "failed", "out of memory")
    rows = [row for row in study.rows if (row.task, row.method, row.seed) != ("t1", "m2", 2)]
    entries = [e for e in study.entries if (e.task, e.method, e.seed) != ("t1", "m2", 2)]
    begun = replace(study, methods=[*study.methods, StudyMethod("m3", "Method 3", "m3")], rows=rows)
    text = markdown("x", study_tables(replace(begun, entries=[*entries, failed, *waiting])))
    assert "Means over 2 to 3 seeds ± one standard error over them; lower is better" in text
    tables, missing = text.split("## Missing runs")
    assert "Method 3" not in tables
    assert "Method 2" in tables
    assert [line for line in missing.splitlines() if line.startswith("| Method")] == [
        "| Method 2 | Task t1 | 2 | failed | out of memory |",
        "| Method 3 | all | 0, 1, 2 | waiting |  |",
    ]
    one_seed = [e for e in entries if e.method != "m2" or e.seed == 0]
    assert "Means over 1 to 3 seeds ± one standard error over them (with one seed, of its estimate)" in markdown(
        "x", study_tables(replace(begun, entries=one_seed))
    )
    assert "Means over 3 seeds ± one standard error over them;" in markdown("x", study_tables(study))


def test_an_unknown_final_value_is_not_replaced_by_an_earlier_one() -> None:
    study = small_study()
    rows = [replace(r, value=math.inf) if (r.task, r.seed, r.sequences) == ("t1", 0, 1000) else r for r in study.rows]
    assert set(last_values(replace(study, rows=rows), "kl_p_pi")["t1", "m1"]) == {1, 2}


def test_differences_are_paired_and_tested_over_tasks() -> None:
    found = paired(small_study(), "kl_p_pi", "m1", "m2")
    assert found is not None
    gaps = [-0.10, 0.05, 1.0]
    assert found.difference.value == pytest.approx(sum(gaps) / 3)
    assert found.p == pytest.approx(stats.wilcoxon(gaps).pvalue)
    assert (found.tasks, found.won, found.lost) == (3, 1, 2)
    # On t2 the seeds differ by −0.05, 0.05, 0.15: no clear difference. On t3 they differ by 1 each.
    assert (found.clearly_won, found.clearly_lost) == (1, 1)
    assert best_of(small_study(), "kl_p_pi") == {"t1": ["m1"], "t2": ["m2"], "t3": ["m2"]}
    assert len(all_pairs(small_study(), "kl_p_pi")) == 1
    for sizes, pairs in (((8, 8), 1), ((8, 16), 0), ((8, None), 1)):
        methods = [replace(m, batch_size=n) for m, n in zip(small_study().methods, sizes, strict=True)]
        assert len(all_pairs(replace(small_study(), methods=methods), "kl_p_pi")) == pairs


def test_with_one_task_the_test_is_over_seeds() -> None:
    whole = small_study()
    one = replace(whole, tasks=whole.tasks[:1])
    found = paired(one, "kl_p_pi", "m1", "m2")
    assert found is not None
    assert found.p == pytest.approx(stats.ttest_rel(KL["t1", "m1"], KL["t1", "m2"]).pvalue)
    assert paired(replace(one, rows=[]), "kl_p_pi", "m1", "m2") is None


def test_tables_have_means_goals_and_the_best_methods() -> None:
    tables = {table.title: table for table in study_tables(small_study())}
    kl = tables["KL(p‖π), nats"]
    assert [cell.text for cell in kl.rows[0]] == ["Task t1", "3.000 ± 0.010", "0.320 ± 0.012", "0.420 ± 0.015"]
    assert [cell.best for cell in kl.rows[0]] == [False, False, True, False]
    assert [cell.text for cell in tables["Moments, E_π[φ]"].rows[1][:2]] == ["Task t2", "0.5"]
    won = tables["Tasks on which a method is best"]
    assert [[cell.text for cell in row[:2]] for row in won.rows] == [["Method 1", "1 of 3"], ["Method 2", "2 of 3"]]


@cache
def hostile_figures() -> list[StudyFigure]:
    return list(study_figures(small_study(title=HOSTILE, label=HOSTILE)))


def test_no_label_breaks_out_of_a_table_or_the_page() -> None:
    study = small_study(title=HOSTILE, label=HOSTILE)
    tables, figures = study_tables(study), hostile_figures()
    text, tex, page = markdown(study.title, tables), latex(tables), render_page(study, tables, figures)
    assert "<img" not in text
    assert r"\| {all}" in text
    assert r"\& 50\% of\_\$it | \{all\}" in tex
    assert "<img src=x" not in page
    assert page.count("&lt;img src=x") >= 4
    for figure in figures:
        # Well-formed; the label is a comment and outlines, never an element.
        drawn = ElementTree.fromstring(figure.files["svg"])
        assert all("img" not in element.tag and "onerror" not in element.attrib for element in drawn.iter())
    assert page.count('<img src="data:image/svg+xml;base64,') == len(figures)
    for line in tex.splitlines():
        if line.endswith(r"\\"):
            # As many cells as the table has columns: no label has added one.
            assert line.replace(r"\&", "").count("&") in {len(table.columns) - 1 for table in tables}


def test_a_method_has_one_style_in_all_studies_and_variants_share_a_colour() -> None:
    methods = [
        StudyMethod("a", "A", "a"),
        StudyMethod("b 8", "B", "b", 8),
        StudyMethod("b 16", "B", "b", 16),
        StudyMethod("c", "C", "c"),
    ]
    style = method_styles(methods)
    assert style["b 8"].color == style["b 16"].color
    assert style["b 8"].dash != style["b 16"].dash
    assert len({style[name].color for name in ("a", "b 8", "c")}) == 3
    # The same in another study with other methods.
    known = [StudyMethod("x", "X", "x"), StudyMethod("gdc", "GDC", "gdc")]
    assert method_styles(known)["gdc"] == method_styles([*reversed(known), *methods])["gdc"]
    assert method_styles(known)["x"].color != method_styles(known)["gdc"].color
    many = method_styles([StudyMethod(str(i), str(i), str(i)) for i in range(20)])
    assert len({(one.color, str(one.dash)) for one in many.values()}) == 20


def test_each_measured_metric_has_its_figure() -> None:
    study = small_study()
    names = {figure.name for figure in hostile_figures()}
    assert names == {
        "kl_p_pi",
        "kl_pi_a",
        "self_bleu_5",
        "moments",
        "kl_p_pi_passes",
        "alignment_diversity",
        "kl_frontier",
    }
    sized = replace(study, methods=[replace(m, batch_size=8 * (i + 1)) for i, m in enumerate(study.methods)])
    noise = [Row("t1", "m1", 0, s, s, "gradient_variance", 1.0, math.nan) for s in (500, 1000)]
    one_task = [row for row in study.rows if row.task == "t1" and row.metric == "kl_p_pi"]
    more = {figure.name for figure in study_figures(replace(sized, tasks=study.tasks[:1], rows=[*one_task, *noise]))}
    assert more - names == {"batch_size", "variance"}
    assert list(study_figures(replace(study, rows=[]))) == []


def test_results_without_a_run_are_still_a_page(tmp_path: Path) -> None:
    failed = [replace(entry, status="failed", error="no <b>luck</b>") for entry in small_study().entries]
    write_study(replace(small_study(), rows=[], entries=failed), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "no &lt;b&gt;luck&lt;/b&gt;" in page
    assert (tmp_path / "results.csv").read_text().count("\n") == 1


def test_unknown_numbers_are_empty_cells(tmp_path: Path) -> None:
    write_results(tmp_path / "r.csv", [Row("a, b", "m", 0, 1, 2, "kl_p_pi", math.nan, 0.5)])
    assert (tmp_path / "r.csv").read_text().splitlines()[1] == '"a, b",m,0,1,2,kl_p_pi,,0.5'


def test_runs_become_rows_from_base_to_end(tmp_path: Path) -> None:
    run = write_synthetic_run(tmp_path / "parity")
    study = study_of_runs([run.path])
    kl = [row for row in study.rows if row.metric == "kl_p_pi"]
    assert [row.sequences for row in kl[:2]] == [0, 8192]
    assert len(kl) <= 2 + 24 + 1
    assert (kl[-1].sequences, kl[-1].value) == (8192 + 60 * 256, 0.0322)
    places = [row.sequences for row in kl]
    assert places == sorted(set(places))
    assert study.tasks[0].goals == {"female": 0.235, "male": 0.235}


def test_a_folder_without_a_study_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no study"):
        read_study(StudyDirectory(tmp_path))
