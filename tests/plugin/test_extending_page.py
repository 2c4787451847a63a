"""The classes of docs/extending.md, written to files as the page says, each in a run of its own."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from enumerable import tiny_model
from tiltlm.app.tune import tune_config
from tiltlm.config.run import parse_config
from whole_runs import metrics

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
BLOCKS = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```\n\n```yaml", PAGE.read_text(encoding="utf-8"), re.DOTALL))
SETTINGS = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with the page's files and a tiny model."""
    torch.set_num_threads(1)
    for name, code in BLOCKS.items():
        (tmp_path / name).write_text(code)
        monkeypatch.delitem(sys.modules, name.removesuffix(".py"), raising=False)
    tiny_model("gpt2", "pad_is_eos", dtype=torch.float32).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def run(**changes: Any) -> list[dict[str, Any]]:
    settings: dict[str, Any] = {
        "model": "model",
        "target": {"reward": {"feature": {"length": "words"}, "beta": 2.0}, "samples": 100},
        "method": "gdc++",
        "prompts": ["a", "b"],
        "max_completion_length": 4,
        "evaluation": {"samples": 30, "texts": 4, "top_p": None},
        **changes,
    }
    own = {"max_steps": 2, "batch_size": 32, "reuse_fit_samples": False}
    settings["training"] = {**own, **changes.get("training", {})}
    tune_config(parse_config(settings), Path("run"), console=Console(file=io.StringIO()))
    return metrics(Path("run"))


def test_the_page_has_code_for_every_setting_that_it_shows() -> None:
    assert [*BLOCKS] == ["my_targets.py", "my_objectives.py", "my_ranks.py", "my_callbacks.py"]
    assert len(SETTINGS) == len(BLOCKS)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("settings", SETTINGS, ids=[*BLOCKS])
def test_what_the_page_shows_runs(settings: str) -> None:
    changes = yaml.safe_load(settings)
    if "target" in changes:  # texts of the tiny model have four words at most
        changes["target"]["args"]["words"] = 1
    lines = run(**changes)
    assert len(lines) == 2
    assert all(line["grad_norm"] > 0 for line in lines)


@pytest.mark.usefixtures("here")
def test_the_advantage_of_the_page_is_the_rank_within_the_prompt() -> None:
    import importlib

    from tiltlm.objectives import Record

    objective = importlib.import_module("my_ranks").RankAdvantage()
    nothing = torch.zeros(5)
    reward, prompts = torch.tensor([1.0, 5.0, 2.0, 9.0, 7.0]), torch.tensor([0, 0, 0, 1, 1])
    record = Record(nothing, nothing, nothing, nothing, 0.0, reward=reward, prompt_index=prompts)
    assert objective.advantages(record).tolist() == [-1.0, 1.0, 0.0, 1.0, -1.0]
