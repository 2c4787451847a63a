"""Checkpoints: whole or not at all, kept in twos, and honest about damage."""

from __future__ import annotations

import errno
import json
import math
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tiltlm.errors import CheckpointError
from tiltlm.training import checkpoint
from tiltlm.training.checkpoint import (
    latest_checkpoint,
    load_base_sample,
    load_checkpoint,
    save_base_sample,
    save_checkpoint,
)
from tiny_world import World, build_trainer

STATE = {
    "weights": torch.arange(5, dtype=torch.float64),
    "nested": {"none": None, "list": [1, 2.5, "three"]},
    "queue": 7,
}


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 12, STATE)
    state = load_checkpoint(path)
    assert torch.equal(state["weights"], STATE["weights"])
    assert state["nested"] == STATE["nested"]
    assert state["queue"] == 7
    header = json.loads((path / "state.json").read_text())
    assert header["step"] == 12
    assert header["schema"] == 2


def test_a_checkpoint_of_a_later_version_is_not_read(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 12, STATE)
    header = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**header, "schema": 3}))
    with pytest.raises(CheckpointError, match=r"schema 3.*resume with the version that wrote it"):
        load_checkpoint(path)


def test_the_last_two_are_kept_and_the_latest_is_found(tmp_path: Path) -> None:
    for step in (5, 50, 100, 1000):
        save_checkpoint(tmp_path, step, STATE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000100", "step-001000"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step-001000"
    assert latest_checkpoint(tmp_path / "nowhere") is None


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def a_list(path: Path) -> None:
    path.write_text("[1, 2]")


def a_string(path: Path) -> None:
    path.write_text('"sha256"')


@pytest.mark.parametrize(
    ("file", "damage"),
    [("tensors.pt", d) for d in (truncate, flip, empty, remove)]
    + [("state.json", d) for d in (truncate, flip, empty, remove, a_list, a_string)],
)
def test_damage_is_a_checkpoint_error_that_says_what_to_do(
    tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    path = save_checkpoint(tmp_path, 3, STATE)
    damage(path / file)
    with pytest.raises(CheckpointError, match=r"step-000003 is damaged.*[Dd]elete that folder"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "field",
    [
        "partition",
        "step",
        "counter",
        "seconds",
        "policy",
        "drawer",
        "drawer.queue",
        "drawer.proposal",
        "counter.sequences",
    ],
)
def test_a_state_without_one_of_its_fields_is_a_checkpoint_error(world: World, tmp_path: Path, field: str) -> None:
    trainer = build_trainer(world, folder=tmp_path, batch_size=20)
    trainer.train_step()
    trainer.save()
    state = trainer.state_dict()
    *parts, last = field.split(".")
    inner = state
    for part in parts:
        inner = inner[part]
    del inner[last]
    save_checkpoint(tmp_path, 1, state)
    with pytest.raises(CheckpointError, match="step-000001"):
        build_trainer(world, folder=tmp_path).resume()


def test_a_checkpoint_of_another_model_is_a_checkpoint_error(world: World, tmp_path: Path) -> None:
    trainer = build_trainer(world, folder=tmp_path, batch_size=20)
    trainer.train_step()
    trainer.save()
    with pytest.raises(CheckpointError, match="does not fit this run"):
        build_trainer(world, folder=tmp_path, lora=True).resume()


@pytest.mark.serial
def test_a_full_disk_leaves_the_checkpoints_before_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build_trainer(world, folder=tmp_path, batch_size=20)
    trainer.train_step()
    trainer.save()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    save = torch.save

    def half(state: object, file: object) -> None:
        file.write(b"half a file")  # type: ignore[attr-defined]
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    trainer.train_step()
    with pytest.raises(CheckpointError, match=r"step 2 could not be written.*no space left.*--resume"):
        trainer.save()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    monkeypatch.setattr(torch, "save", save)
    again = build_trainer(world, folder=tmp_path)
    assert again.resume()
    assert again.step == 1


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Within the block the system refuses to let any file grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.serial
def test_a_file_that_the_system_stops_half_way_leaves_the_checkpoints_before_it(world: World, tmp_path: Path) -> None:
    trainer = build_trainer(world, folder=tmp_path, batch_size=20)
    trainer.train_step()
    trainer.save()
    trainer.train_step()
    with files_up_to(50_000), pytest.raises(CheckpointError, match="step 2 could not be written"):
        trainer.save()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    load_checkpoint(tmp_path / "step-000001")


def test_what_a_killed_process_left_half_written_is_no_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, STATE)
    left = tmp_path / "partial-000006"
    left.mkdir()
    (left / checkpoint.STATE).write_bytes(b"half")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-000003"
    save_checkpoint(tmp_path, 6, STATE)
    assert not left.exists()
    load_checkpoint(tmp_path / "step-000006")


def test_the_base_sample_comes_back_with_its_texts_and_values(world: World, tmp_path: Path) -> None:
    assert load_base_sample(tmp_path, world.base) is None
    save_base_sample(tmp_path, world.base_sample)
    again = load_base_sample(tmp_path, world.base)
    assert again is not None
    kept = world.base_sample
    assert torch.equal(again.features, kept.features)
    assert torch.equal(again.samples.sequence_logprob, kept.samples.sequence_logprob)
    assert again.samples.texts == kept.samples.texts
    assert again.samples.prompt_texts == kept.samples.prompt_texts
    assert again.max_completion_length == kept.max_completion_length
    assert again.samples.settings == kept.samples.settings


@pytest.mark.parametrize("damage", [truncate, empty])
def test_a_damaged_base_sample_is_a_checkpoint_error(
    world: World, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    save_base_sample(tmp_path, world.base_sample)
    damage(tmp_path / checkpoint.BASE_SAMPLE)
    with pytest.raises(CheckpointError, match=r"base_sample.pt is damaged"):
        load_base_sample(tmp_path, world.base)


def test_numbers_that_json_has_no_word_for_survive(world: World, tmp_path: Path) -> None:
    """A log Z of −inf, while no sample has hit the target yet, is a state like any other."""
    trainer = build_trainer(world, folder=tmp_path, batch_size=20)
    trainer.partition = type(trainer.partition).empty()
    trainer.save()
    again = build_trainer(world, folder=tmp_path)
    again.resume()
    assert again.partition == trainer.partition
    assert again.partition.log_z.value == -math.inf
