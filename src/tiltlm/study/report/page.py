"""The page of a study: one self-contained HTML file with its tables, its figures and its settings."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from tiltlm.reports.report import templates
from tiltlm.study.record import Study
from tiltlm.study.report.drawing import StudyFigure
from tiltlm.study.report.tables import Table


@dataclass(frozen=True)
class PageFigure:
    """A figure of the page, as an image, so that text of a user cannot become part of the page."""

    title: str
    explanation: str
    source: str
    files: str


def render_page(study: Study, tables: Sequence[Table], figures: Sequence[StudyFigure]) -> str:
    """The page's HTML; all text is escaped."""
    import yaml

    count = {status: sum(e.status == status for e in study.entries) for status in ("done", "failed")}
    return (
        templates()
        .get_template("study.html.j2")
        .render(
            title=study.title,
            tables=tables,
            figures=[_page_figure(figure) for figure in figures],
            runs=len(study.entries),
            done=count["done"],
            failed=count["failed"],
            tasks=len(study.tasks),
            methods=len(study.methods),
            seeds=len({entry.seed for entry in study.entries}),
            made={key: value for key, value in study.made.items() if key not in ("study", "versions", "command")},
            command=" ".join(study.made.get("command") or []),
            versions=study.made.get("versions") or {},
            config=yaml.safe_dump(study.made.get("study") or {}, sort_keys=False, allow_unicode=True, width=100),
        )
    )


def _page_figure(figure: StudyFigure) -> PageFigure:
    encoded = base64.b64encode(figure.files["svg"]).decode()
    files = f"figures/{figure.name}.pdf, .svg, .png"
    return PageFigure(figure.title, figure.explanation, f"data:image/svg+xml;base64,{encoded}", files)
