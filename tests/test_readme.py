"""README.md: of a size that is read at once, and its run file is one."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from tiltlm.app.plan import plan_run
from tiltlm.config.run import parse_config
from tiltlm.objectives import BUILT_IN

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_it_is_short() -> None:
    lines = TEXT.splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 160


def test_its_run_file_can_be_planned() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
    plan = plan_run(parse_config(yaml.safe_load(block)))
    assert [feature.name for feature in plan.features] == ["female"]


def test_its_table_names_the_methods_that_there_are() -> None:
    section = TEXT[TEXT.index("## Methods") : TEXT.index("## Results")]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert named == set(BUILT_IN) - {"reinforce_p"}


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT):
        assert target.startswith("https://") or (README.parent / target).exists(), target
