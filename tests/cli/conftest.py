"""The command line as a user types it, in this process, on a tiny model with a real tokenizer."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import Answer, Command, type_command, write_config

WORDS = ["she", "her", "he", "him", "the", "a", "team", "game", "wins", "plays", "was", "is", "good", "bad", "old", "."]
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


# Two layers of width 32 gain nothing from threads, and lose much where other processes want the cores too.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random two-layer Llama and a tokenizer of some words, so that features vary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(vocabulary),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=64,
                pad_token_id=vocabulary["<pad>"],
                bos_token_id=vocabulary["<s>"],
                eos_token_id=vocabulary["</s>"],
                initializer_range=0.1,
            )
        )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def settings(tiny: Path) -> dict[str, Any]:
    """A run file that takes a second; do not change it in place."""
    return {
        "model": str(tiny),
        "target": {"constraints": [{"feature": {"pronouns": "female"}, "moment": 0.5}], "samples": 256},
        "training": {"max_steps": 4, "batch_size": 32, "learning_rate": 0.002, "save_steps": 2},
        "evaluation": {"samples": 64, "texts": 4},
        "max_completion_length": 12,
        "device": "cpu",
    }


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]) -> Iterator[Path]:
    """The working directory, with ``run.yaml`` in it; Python files written there can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delenv("TILTLM_TRACEBACK", raising=False)
    write_config(tmp_path / "run.yaml", settings)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def tiltlm(here: Path, capfd: pytest.CaptureFixture[str]) -> Command:
    """Types a command: ``tiltlm("fit", "run.yaml")``."""

    def run(*words: object) -> Answer:
        capfd.readouterr()
        return Answer(type_command(*words), *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def finished_run(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that ``tiltlm tune`` left behind; copy it before you touch it."""
    folder = tmp_path_factory.mktemp("finished")
    write_config(folder / "run.yaml", settings)
    assert type_command("tune", folder / "run.yaml", "--output-dir", folder / "run") == 0
    return folder / "run"


@pytest.fixture
def finished(finished_run: Path, here: Path) -> Path:
    """A copy of a finished run at ``runs/done``."""
    return shutil.copytree(finished_run, here / "runs" / "done")


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without a report, which is most of the work of a tiny one."""
    monkeypatch.setattr("tiltlm.app.tune.write_report", lambda directory: directory.report_path)
