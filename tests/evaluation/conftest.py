"""What holds for the tests of evaluation."""

from __future__ import annotations

import pytest
import torch

from tiny_world import World, tiny_world

# Tiny tensors gain nothing from threads, and lose much where other processes want the cores too.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world() -> World:
    return tiny_world()
