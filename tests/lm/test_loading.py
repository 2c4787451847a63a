"""Loading: a saved model loads unchanged, and errors say why a model cannot be loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from enumerable import tiny_model
from tiltlm.errors import ModelError, UsageError
from tiltlm.lm import LanguageModel

LORA = {"r": 2, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    tiny_model("gpt2", "several_eos", torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def randomize_adapter(model: LanguageModel) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def test_a_saved_model_loads_offline_and_samples_the_same(saved):
    original = tiny_model("gpt2", "several_eos", torch.float32)
    loaded = LanguageModel.from_pretrained(saved, device="cpu")
    assert (loaded.eos_ids, loaded.pad_id, loaded.start_id) == (original.eos_ids, original.pad_id, original.start_id)
    assert loaded.name == str(saved)
    assert not loaded.model.training
    first, second = (m.sample(30, "a b", seed=0, max_completion_length=6) for m in (original, loaded))
    assert first.completion_ids == second.completion_ids
    assert first.texts == second.texts
    assert torch.equal(first.proposal_logprob, second.proposal_logprob)


def test_weights_are_saved_as_safetensors(saved):
    assert (saved / "model.safetensors").is_file()
    assert not list(saved.glob("*.bin"))


def test_the_embedded_model_loads_by_its_name():
    model = LanguageModel.from_pretrained("embedded", device="cpu")
    assert model.name == "embedded"
    samples = model.sample(4, seed=0, max_completion_length=8)
    assert all(text.strip() for text in samples.texts)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_dtype_is_that_of_the_weights(saved, dtype):
    model = LanguageModel.from_pretrained(saved, device="cpu", dtype=dtype)
    assert {p.dtype for p in model.model.parameters()} == {getattr(torch, dtype)}


def refused(folder: object, **settings: object) -> str:
    with pytest.raises(ModelError) as caught:
        LanguageModel.from_pretrained(folder, device="cpu", **settings)
    message = str(caught.value)
    assert message.startswith("model: ")
    assert str(folder) in message
    assert "\n" not in message
    return message


def test_a_missing_folder_is_refused(tmp_path):
    assert "save_pretrained" in refused(tmp_path / "nothing")


def test_an_unknown_hub_name_is_refused_without_a_network():
    assert "hub" in refused("nobody/no-such-model")


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for file in folder.glob("token*"):
        file.unlink()
    assert "tokenizer" in refused(folder)


def test_a_broken_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text('{"model": {"type": "None"}}')
    assert "tokenizer" in refused(folder)


def test_a_tokenizer_without_bos_and_eos_is_refused(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token"):
        config.pop(name)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert "neither a BOS nor an EOS" in refused(folder)


@pytest.mark.parametrize("damage", ["garbage", "empty", "half"])
def test_damaged_weights_are_refused(folder, damage):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes({"garbage": b"x" * 1000, "empty": b"", "half": whole[: len(whole) // 2]}[damage])
    assert "no model could be loaded" in refused(folder)


def test_a_missing_tensor_is_refused_and_not_filled_with_random_numbers(folder):
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if "c_fc.weight" in key)
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert name in refused(folder)


def test_a_tensor_of_another_shape_is_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights["transformer.wpe.weight"] = weights["transformer.wpe.weight"][:3].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "transformer.wpe.weight has shape (3, 16)" in refused(folder)


def test_pickled_weights_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert "safetensors" in refused(folder)


def test_a_broken_config_is_refused(folder):
    (folder / "config.json").write_text("{")
    assert "config" in refused(folder)


def test_an_unknown_architecture_is_refused(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "no-such-type"}))
    assert "no-such-type" in refused(folder)


def test_code_in_a_model_folder_does_not_run_unasked(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    trace = tmp_path / "it ran"
    (folder / "own.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    assert "custom code" in refused(folder)
    assert not trace.exists()


def test_an_unknown_dtype_or_device_is_named(saved):
    with pytest.raises(UsageError, match=r"^dtype: 'float33' .*did you mean 'float32'"):
        LanguageModel.from_pretrained(saved, device="cpu", dtype="float33")
    with pytest.raises(UsageError, match=r"^device: 'gpu'"):
        LanguageModel.from_pretrained(saved, device="gpu")


def test_auto_device_is_one_that_is_there(saved):
    model = LanguageModel.from_pretrained(saved)
    assert len(model.sample(2, seed=0, max_completion_length=2)) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 2},
        {"r": 0},
        {"r": "two"},
        {"r": 2, "target_modules": ["no_such_module"]},
        {"r": 2, "target_modules": "all-linear", "bias": "all"},
    ],
)
def test_bad_lora_settings_are_named(saved, settings):
    with pytest.raises(UsageError, match=r"^peft"):
        LanguageModel.from_pretrained(saved, device="cpu", peft=settings)


def test_a_fresh_adapter_changes_nothing_and_its_seed_fixes_its_start(saved):
    plain = LanguageModel.from_pretrained(saved, device="cpu")
    before = torch.get_rng_state()
    adapted = [LanguageModel.from_pretrained(saved, device="cpu", peft={**LORA, "seed": s}) for s in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    samples = plain.sample(20, seed=0, max_completion_length=6)
    torch.testing.assert_close(adapted[0].logprob(samples), plain.logprob(samples))
    start = [next(p for n, p in m.model.named_parameters() if "lora_A" in n) for m in adapted]
    assert torch.equal(start[0], start[1])
    assert not torch.equal(start[0], start[2])


def test_an_adapter_is_saved_as_one_and_loads_merged_or_on_its_base(saved, tmp_path):
    tuned = LanguageModel.from_pretrained(saved, device="cpu", peft=LORA)
    randomize_adapter(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    samples = tuned.sample(30, PROMPTS_RAGGED, seed=0, max_completion_length=6)
    base = LanguageModel.from_pretrained(saved, device="cpu")
    with torch.no_grad():
        assert (base.logprob(samples) - samples.proposal_logprob).abs().max() > 0.1
        merged = LanguageModel.from_pretrained(tmp_path / "adapter", device="cpu")
        assert not merged.has_adapter
        torch.testing.assert_close(merged.logprob(samples), samples.proposal_logprob, rtol=0, atol=1e-5)
        adapted = base.with_adapter(tmp_path / "adapter")
        assert adapted.has_adapter
        torch.testing.assert_close(adapted.logprob(samples), samples.proposal_logprob, rtol=0, atol=1e-5)
    assert all(p.requires_grad for p in merged.model.parameters()), "it can be tuned further"


def test_a_missing_or_damaged_adapter_is_refused(saved, tmp_path):
    model = LanguageModel.from_pretrained(saved, device="cpu", peft=LORA)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"x")
    for name in ("adapter", "nothing"):
        with pytest.raises(ModelError, match=r"^model: no adapter"):
            LanguageModel.from_pretrained(saved, device="cpu").with_adapter(tmp_path / name)


PROMPTS_RAGGED = ["a", "b a b"]
