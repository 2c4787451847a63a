"""What holds for the tests of training: the enumerable world, and a model folder for whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from enumerable import tiny_model
from tiny_world import World, tiny_world

# Tiny tensors gain nothing from threads, and lose much where other processes want the cores too.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world() -> World:
    return tiny_world()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer GPT-2 in float32 with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model("gpt2", "pad_is_eos", dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(model_folder: Path) -> dict[str, Any]:
    """A whole run of a second or two: a filter and a moment, off-policy, with a checkpoint every three steps."""
    return {
        "model": str(model_folder),
        "target": {
            "constraints": [
                {"feature": {"contains": "a"}, "moment": 0.6},
                {"feature": {"not": {"contains": "c"}}, "moment": 1.0, "name": "no c"},
            ],
            "samples": 200,
        },
        "method": {"name": "gdc++", "proposal": "kl", "check_steps": 2},
        "training": {
            "max_steps": 12,
            "batch_size": 50,
            "learning_rate": 1e-3,
            "save_steps": 3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
        },
        "max_completion_length": 4,
        "evaluation": {"samples": 50, "texts": 5, "top_p": None},
        "seed": 4,
    }
