"""The fingerprint of a base: every change of its weights changes it, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from enumerable import tiny_model
from tiltlm.lm import LanguageModel
from tiltlm.lm.fingerprint import ROW_BYTES


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    """A model with one weight that fills several rows of the hashed table and part of another."""
    model = tiny_model("gpt2", "pad_is_eos", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    model.model.large = torch.nn.Parameter(torch.randn(5, ROW_BYTES // 4 - 3, generator=generator))
    return model


def one_bit(weight: torch.Tensor) -> None:
    weight[3, 7] = torch.nextafter(weight[3, 7], torch.tensor(9.0))


def rows_exchanged(weight: torch.Tensor) -> None:
    table = weight.view(-1)[: 4 * ROW_BYTES // 4].view(4, -1)
    table[[0, 2]] = table[[2, 0]].clone()


def columns_exchanged(weight: torch.Tensor) -> None:
    table = weight.view(-1)[: 4 * ROW_BYTES // 4].view(4, -1)
    table[:, [0, 2]] = table[:, [2, 0]].clone()


def last_one(weight: torch.Tensor) -> None:
    weight[-1, -1] += 1


@pytest.mark.parametrize("change", [one_bit, rows_exchanged, columns_exchanged, last_one])
def test_every_change_changes_the_fingerprint(base: LanguageModel, change: Callable[[torch.Tensor], None]) -> None:
    changed = base.copy()
    assert changed.fingerprint() == base.fingerprint()
    change(changed.model.large.data)
    assert changed.fingerprint() != base.fingerprint()


def test_every_parameter_counts(base: LanguageModel) -> None:
    for name, _ in base.model.named_parameters():
        changed = base.copy()
        changed.model.get_parameter(name).data.view(-1)[-1] += 1
        assert changed.fingerprint() != base.fingerprint(), name


def test_other_dtypes_are_other_weights(base: LanguageModel) -> None:
    half = base.copy()
    half.model.bfloat16()
    assert half.fingerprint() != base.fingerprint()


def test_saving_and_adapters_do_not_change_it(tmp_path: Path) -> None:
    base = tiny_model("llama", "several_eos", dtype=torch.float32)
    before = base.fingerprint()
    base.save_pretrained(tmp_path)
    assert LanguageModel.from_pretrained(tmp_path, device="cpu").fingerprint() == before
    adapted = base.with_lora(r=2, target_modules="all-linear", modules_to_save=["norm"], init_lora_weights=False)
    assert adapted.model.active_adapters == ["default"]
    assert adapted.fingerprint() == before
