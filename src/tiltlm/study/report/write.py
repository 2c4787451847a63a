"""The results of a study: results.csv, tables in Markdown and LaTeX, figures, and one page with everything."""

from __future__ import annotations

from pathlib import Path

from tiltlm.runs import storage
from tiltlm.study.record import Study
from tiltlm.study.report.figures import study_figures
from tiltlm.study.report.page import render_page
from tiltlm.study.report.tables import latex, markdown, study_tables
from tiltlm.study.rows import write_results


def write_study(study: Study, folder: Path) -> list[Path]:
    """Write everything into a folder, from numbers alone; returns what a reader opens. Raises CheckpointError."""
    with storage.writing(folder):
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    write_results(folder / "results.csv", study.rows)
    tables, figures = study_tables(study), list(study_figures(study))
    page = render_page(study, tables, figures)
    texts = {"tables.md": markdown(study.title, tables), "tables.tex": latex(tables), "report.html": page}
    for name, text in texts.items():
        storage.write_atomically(folder / name, text.encode("utf-8", errors="replace"))
    for figure in figures:
        for form, data in figure.files.items():
            storage.write_atomically(folder / "figures" / f"{figure.name}.{form}", data)
    return [folder / "results.csv", folder / "tables.md", folder / "tables.tex", folder / "report.html"]
