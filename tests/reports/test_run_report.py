"""The report: complete in every state of a run, and safe with any text that a model writes."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tiltlm.errors import UsageError
from tiltlm.reports.charts import how_to_read, positions
from tiltlm.reports.report import duration, write_report
from tiltlm.reports.summary import summarize
from tiltlm.runs.directory import RunDirectory

MakeRun = Callable[..., RunDirectory]

HOSTILE = (
    "<script>document.title='owned'</script>",
    "</title><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    '" onmouseover="document.title=\'owned\'" x="',
    "</style></pre></details><svg onload=\"document.title='owned'\">",
)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Reader(HTMLParser):
    """Collects the tags with attributes, the visible text, and whether every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def page_of(run: RunDirectory) -> str:
    return write_report(run.path).read_text(encoding="utf-8")


def hostile_page(make_run: MakeRun) -> str:
    names = {"female": HOSTILE[1], "male": HOSTILE[3]}
    config = {"model": HOSTILE[4], HOSTILE[1]: HOSTILE[0]}
    run = make_run(texts=HOSTILE, prompt=HOSTILE[2], names=names, config=config)
    run.mark_failed(ValueError(HOSTILE[1]), device=HOSTILE[0])
    return page_of(run)


def test_a_finished_run_shows_its_figures_and_texts(make_run: MakeRun) -> None:
    page = page_of(make_run())
    words = Reader(page).words
    for expected in (
        "Both goals are met.",
        "Target: a mean of 0.235 for “female” and 0.235 for “male”; otherwise as close to the base model as possible.",
        "within two standard errors of it, or within 0.03 and nearer to it than to the base",
        "Line and band: training batches ± two standard errors. Ring: base. Dot and bar: evaluation",
        "0.032 ± 0.004",
        "the base has 0.192 ± 0.005",
        "from 0 (equal) to 1; the base has 0.271 ± 0.006",
        "0.159 ± 0.004",
        "1,893 ± 14",
        "23,552",
        "0.061 ± 0.003",
        "0.226 ± 0.009",
        "0.240 ± 0.010",
        "Self-BLEU-5",
        "4 min 18 s",
        "1 min 42 s · 39 %",
        "name: gdc++",
    ):
        assert expected in words, expected
    assert page.count("<svg") == 5
    assert "2 of 60 points lie above the axis" in words


def test_the_page_is_well_formed_and_self_contained(make_run: MakeRun) -> None:
    page = page_of(make_run())
    reader = Reader(page)
    assert reader.open == []
    assert not {"script", "link", "iframe", "img", "object"} & {tag for tag, _ in reader.tags}
    for tag, attributes in reader.tags:
        for name, value in attributes.items():
            assert name not in ("src", "srcset"), tag
            assert name not in ("href", "xlink:href") or (value or "").startswith("#"), tag
    assert not re.search(r"url\((?!#)|@import|@font-face", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert "prefers-color-scheme: dark" in page


def test_evidence_is_marked_in_its_features_colour(make_run: MakeRun) -> None:
    page = page_of(make_run(texts=("Then she met him.",)))
    assert (
        '<mark class="series-0" title="female">she</mark> met <mark class="series-1" title="male">him</mark>.' in page
    )


def test_steps_that_draw_nothing_are_placed_evenly_over_the_samples_they_train_on() -> None:
    steps = [{"sequences": drawn} for drawn in (800, 800, 800, 800, 900, 1000, 1000)]
    assert positions(steps) == [200, 400, 600, 800, 900, 950, 1000]
    assert "are placed evenly over them" in how_to_read([], summarize({}, []), steps)
    assert "placed" not in how_to_read([], summarize({}, []), steps[3:6])
    assert positions([{"sequences": 5}, {}, {"sequences": 9}, {"sequences": 9}])[2:] == [7, 9]


def test_a_text_of_the_base_shows_no_probability_under_the_tuned_model(make_run: MakeRun) -> None:
    run = make_run()
    record = {"prompt": None, "features": {}, "evidence": [], "base_logprob": -7.0, "policy_logprob": -7.5}
    run.write_samples([record | {"model": "base", "text": "one"}, record | {"model": "policy", "text": "two"}])
    _, base, tuned, _ = Reader(page_of(run)).words.split("log a ")
    assert base.startswith("−7 ")
    assert tuned.startswith("−7, log π −7.5 ")


def test_overlapping_evidence_is_marked_for_both_features(make_run: MakeRun) -> None:
    run = make_run()
    spans = [{"feature": "female", "start": 0, "end": 3}, {"feature": "male", "start": 2, "end": 5}]
    run.write_samples([{"model": "base", "prompt": None, "text": "abcde", "features": {}, "evidence": spans}])
    assert (
        '<mark class="series-0" title="female">ab</mark><mark class="series-0" title="female">'
        '<mark class="series-1" title="male">c</mark></mark><mark class="series-1" title="male">de</mark>'
    ) in page_of(run)


def test_the_text_is_shown_exactly_as_it_was_written(make_run: MakeRun) -> None:
    text = "  two  spaces\n\nand <b>tags</b> & entities &amp; \ttabs"
    page = page_of(make_run(texts=(text,)))
    shown = [
        html.unescape(re.sub("<[^>]+>", "", cell)) for cell in re.findall(r'class="sample-text">(.*?)</p>', page, re.S)
    ]
    assert text in shown


def test_unevaluated_failed_and_empty_runs_have_a_report(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run(steps=23, evaluated=False)
    assert "The run has not ended: step 23 of 60." in Reader(page_of(run)).words
    run.mark_interrupted()
    words = Reader(page_of(run)).words
    assert "Not evaluated yet." in words
    assert "interrupted at step 23 of 60" in words
    assert "--resume" in words
    assert "The tuned model’s figures are from training step 23" in words
    assert "✓ met" not in words
    assert "✗ not met" not in words
    run.mark_failed(ArithmeticError("the loss is NaN"))
    words = Reader(page_of(run)).words
    assert "The run failed at step 23 of 60." in words
    assert "ArithmeticError: the loss is NaN" in words
    empty = RunDirectory.create(tmp_path / "empty", {"model": "embedded"}, seed=0)
    empty.mark_failed(UsageError("no such model"))
    words = Reader(page_of(empty)).words
    assert "The run failed before it was evaluated." in words
    assert "UsageError: no such model" in words
    assert "No samples were written yet." in words


def test_features_of_other_kinds_and_scales_get_plots_of_their_own(make_run: MakeRun) -> None:
    run = make_run(names={"female": "length in words"})
    target = run.read_run()["target"]
    target["features"][0] |= {"goal": 24.0, "base": {"value": 17.0, "se": 0.1}, "achieved": {"value": 24.0, "se": 0.2}}
    target["features"][1] |= {"kind": "reward", "goal": None}
    run.write_run(target=target)
    words = Reader(page_of(run)).words
    assert "length in words over training" in words
    assert "male over training" in words
    assert "under p 0.235 ± 0.006" in words
    assert "The goal is not met." in words


def test_a_record_with_gaps_is_no_error(make_run: MakeRun) -> None:
    run = make_run(steps=3)
    record = run.read_run()
    record["evaluation"]["policy"] = {"samples": 10, "moments": {"female": {"value": None, "se": None}}}
    record["evaluation"].pop("base")
    record["target"]["features"][0] |= {"base": {"value": None, "se": None}, "coefficient": None}
    run.write_run(evaluation=record["evaluation"], target=record["target"], progress={"step": 3})
    run.append_metrics(
        {"step": 4, "sequences": 9999, "kl_p_pi": {"value": None, "se": None}, "moments": {}, "seconds": {}}
    )
    assert "nan" not in Reader(page_of(run)).words.lower().split()


def test_hostile_text_is_escaped_everywhere(make_run: MakeRun) -> None:
    page = hostile_page(make_run)
    reader = Reader(page)
    assert reader.open == []
    assert not {"script", "img"} & {tag for tag, _ in reader.tags}
    assert not [name for _, attributes in reader.tags for name in attributes if name.startswith("on")]
    for text in HOSTILE:
        assert text not in page
        assert " ".join(text.split()) in reader.words


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine to open the report with")
def test_a_browser_runs_no_script_of_a_model(make_run: MakeRun, tmp_path: Path) -> None:
    page = hostile_page(make_run)
    # The page's policy forbids scripts too. Escaping must suffice without it.
    unlocked, found = re.subn(r"<meta http-equiv[^>]*>", "", page)
    assert found == 1
    assert "<title>parity · tiltlm report</title>" in browser_dom(unlocked, tmp_path / "unlocked")
    # Unescaped, the same text runs without the policy, so this test can fail; the policy stops it.
    raw = f"<main>{HOSTILE[0]}"
    assert "<title>owned</title>" in browser_dom(unlocked.replace("<main>", raw, 1), tmp_path / "raw")
    assert "<title>owned</title>" not in browser_dom(page.replace("<main>", raw, 1), tmp_path / "locked")


def browser_dom(page: str, folder: Path) -> str:
    folder.mkdir()
    (folder / "page.html").write_text(page, encoding="utf-8")
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=2000",
        "--dump-dom",
        (folder / "page.html").as_uri(),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_no_model_library_is_loaded(make_run: MakeRun) -> None:
    run = make_run(steps=4)
    script = (
        "import sys\n"
        "from tiltlm.reports.report import write_report\n"
        "assert 'matplotlib' not in sys.modules and 'jinja2' not in sys.modules\n"
        "write_report(sys.argv[1])\n"
        "assert 'matplotlib' in sys.modules\n"
        "heavy = {'torch', 'transformers', 'peft', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", script, str(run.path)], check=True, timeout=120)


def test_a_report_of_no_run_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a run directory"):
        write_report(tmp_path)


def test_an_earlier_report_is_replaced(make_run: MakeRun) -> None:
    run = make_run(steps=2)
    run.report_path.write_text("old")
    assert write_report(run) == run.report_path
    assert run.report_path.read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("seconds", "text"), [(8.42, "8.42 s"), (59.99, "60 s"), (258.4, "4 min 18 s"), (7500, "2 h 5 min")]
)
def test_durations_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text
