"""bfloat16 products on hardware that supports them: what is computed in bfloat16; and caches with reserved memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_sampling import count_rows
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.pytorch_utils import Conv1D

from enumerable import PROMPTS, tiny_model
from tiltlm.errors import UsageError
from tiltlm.lm import LanguageModel, Roles, Samples, next_token
from tiltlm.lm import sampling as sampling_module
from tiltlm.lm.cache import ReservedLayer, reserve
from tiltlm.lm.precision import FLOAT32_ATTENTION, FUSED_GELU, cache_dtype, native_bfloat16

CPU = torch.device("cpu")
PROMPT = ["The girl", "Once upon a time there was", None]
LORA: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}


def load(native: bool, dtype: str = "auto") -> LanguageModel:
    """The embedded model on hardware with or without bfloat16 products."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tiltlm.lm.model.native_bfloat16", lambda device: native)
        return LanguageModel.from_pretrained("embedded", device="cpu", dtype=dtype)


@pytest.fixture(scope="module")
def auto() -> LanguageModel:
    return load(True)


@pytest.fixture(scope="module")
def single() -> LanguageModel:
    return load(True, "float32")


@pytest.mark.parametrize("native", [False, True])
def test_auto_is_float32_with_products_in_bfloat16_where_they_are_native(native: bool) -> None:
    model = load(native)
    assert {p.dtype for p in model.model.parameters()} == {torch.float32}
    assert model.compute_dtype == (torch.bfloat16 if native else None)
    for other in (model.copy(), model.copy().with_lora(**LORA)):
        assert other.compute_dtype == model.compute_dtype
        assert {p.dtype for p in other.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_another_dtype_products_have_the_dtype_of_the_weights(dtype: str) -> None:
    model = load(True, dtype)
    assert {p.dtype for p in model.model.parameters()} == {getattr(torch, dtype)}
    assert model.compute_dtype is None


@pytest.mark.parametrize(("avx512", "amx"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_cpu_has_native_products_by_either_of_two_instructions(
    avx512: bool, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert native_bfloat16(CPU) is (avx512 or amx)


@pytest.mark.parametrize(("capability", "native"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_has_native_products_from_ampere_on(
    capability: tuple[int, int], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert native_bfloat16(torch.device("cuda")) is native
    assert not native_bfloat16(torch.device("mps"))


def test_attention_on_a_cpu_reads_its_cache_in_float32() -> None:
    assert cache_dtype(CPU, None) is None
    assert cache_dtype(CPU, torch.bfloat16) == torch.float32
    assert cache_dtype(torch.device("cuda"), torch.bfloat16) == torch.bfloat16


def test_without_native_products_auto_is_float32_to_the_last_bit(single: LanguageModel) -> None:
    model = load(False)
    drawn = [m.sample(40, PROMPT, 3, max_completion_length=12) for m in (model, single)]
    assert torch.equal(drawn[0].tokens, drawn[1].tokens)
    assert torch.equal(drawn[0].proposal_logprob, drawn[1].proposal_logprob)
    with torch.no_grad():
        assert torch.equal(model.logprob(drawn[0]), single.logprob(drawn[0]))


def dtypes_while_sampling(model: LanguageModel) -> set[tuple[torch.dtype, torch.dtype]]:
    """Pairs of dtypes, of weights and of outputs, of linear layers while the model samples."""
    seen: set[tuple[torch.dtype, torch.dtype]] = set()
    linear = [m for name, m in model.model.named_modules() if name.endswith(("c_attn", "c_fc", "q_proj", "up_proj"))]
    assert linear
    handles = [
        layer.register_forward_hook(lambda m, _, out: seen.add((next(m.parameters()).dtype, out.dtype)))
        for layer in linear
    ]
    model.sample(4, PROMPT, 0, max_completion_length=4)
    for handle in handles:
        handle.remove()
    return seen


def test_sampling_uses_weights_that_are_cast_once(auto: LanguageModel, single: LanguageModel) -> None:
    assert dtypes_while_sampling(auto) == {(torch.bfloat16, torch.bfloat16)}
    assert dtypes_while_sampling(single) == {(torch.float32, torch.float32)}


@contextmanager
def unchanged(model: LanguageModel) -> Iterator[None]:
    """Check that the block changes no parameter (identity, bits, dtype) and no setting of the model."""
    inner = model._inner
    before = {name: (p, p.detach().clone(), p.requires_grad) for name, p in model.model.named_parameters()}
    every = [(module, dict(module._parameters)) for module in model.model.modules()]
    attention, state = inner.config._attn_implementation, inner.training
    assert attention != FLOAT32_ATTENTION
    yield
    after = dict(model.model.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, values, learns) in before.items():
        assert after[name] is parameter, name
        assert parameter.dtype == values.dtype, name
        assert torch.equal(parameter, values), name
        assert parameter.requires_grad == learns, name
    # Tied parameters too, which have only one name.
    for module, parameters in every:
        assert module._parameters.keys() == parameters.keys()
        assert all(module._parameters[name] is parameters[name] for name in parameters)
    assert [module for module, _ in every] == list(model.model.modules())
    assert inner.config._attn_implementation == attention
    assert inner.training == state
    assert not torch.is_autocast_enabled("cpu")


class Interruption(Exception):
    """Stands for Ctrl-C in the middle of a call."""


def models() -> dict[str, Callable[[], LanguageModel]]:
    def tiny(architecture: str) -> LanguageModel:
        model = tiny_model(architecture, "several_eos", torch.float32).copy()
        model.compute_dtype = torch.bfloat16
        return model

    return {
        "embedded": lambda: load(True),
        "embedded, lora": lambda: load(True).with_lora(**LORA),
        "gpt2, tied": lambda: tiny("gpt2"),
        "llama, tied": lambda: tiny("llama"),
        "opt": lambda: tiny("opt"),
    }


@pytest.mark.parametrize("name", models())
def test_sampling_and_scoring_do_not_change_the_model(name: str) -> None:
    model = models()[name]()
    with unchanged(model):
        samples = model.sample(20, seed=0, max_completion_length=5)
    with unchanged(model), torch.no_grad():
        model.logprob(samples)
    with unchanged(model):
        model.logprob(samples).sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.model.parameters())
    assert {p.grad.dtype for p in model.model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("name", models())
def test_an_exception_does_not_change_the_model_either(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models()[name]()
    cast: list[bool] = []

    def interrupt(done: int, n: int) -> None:
        layers = [m for m in model.model.modules() if type(m) is nn.Linear]
        cast.append(bool(layers) and all(p.dtype == torch.bfloat16 for m in layers for p in m.parameters()))
        raise Interruption

    with unchanged(model), pytest.raises(Interruption):
        model.sample(20, seed=0, max_completion_length=5, progress=interrupt)
    assert cast == [True]
    passes = 0
    draw = sampling_module.draw

    def third(*args: Any, **kwargs: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 3:
            raise KeyboardInterrupt
        return draw(*args, **kwargs)

    monkeypatch.setattr(sampling_module, "draw", third)
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        model.sample(20, seed=0, max_completion_length=5)
    monkeypatch.undo()
    samples = model.sample(4, seed=0, max_completion_length=3)
    out_of_vocabulary = replace(samples, tokens=samples.tokens + model.vocab_size)
    with unchanged(model), pytest.raises(IndexError):
        model.read(out_of_vocabulary)


def test_sampled_log_probabilities_are_close_to_those_of_a_scoring_pass(
    auto: LanguageModel, single: LanguageModel
) -> None:
    samples = auto.sample(200, seed=1, max_completion_length=40)
    with torch.no_grad():
        again, exact = (model.logprob(samples).double().sum(-1) for model in (auto, single))
    assert float(samples.lengths.double().mean()) > 10
    own, other = ((samples.sequence_logprob - found).abs().mean() for found in (again, exact))
    # Above 0, which shows that bfloat16 is used.
    assert 1e-4 < float(own) < 0.2
    assert 1e-4 < float(other) < 0.5
    assert float((again - exact).abs().mean()) > 1e-4


def gradient(model: LanguageModel, samples: Samples) -> Tensor:
    parameters = [p for p in model.model.parameters() if p.requires_grad]
    found = torch.autograd.grad(model.logprob(samples).sum(), parameters)
    assert all(g.dtype == torch.float32 for g in found)
    return torch.cat([g.flatten().double() for g in found])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_gradients_have_nearly_the_direction_and_norm_of_float32_ones(
    auto: LanguageModel, single: LanguageModel, lora: bool
) -> None:
    samples = single.sample(48, PROMPT, 2, max_completion_length=20)
    pair = [model.copy().with_lora(**LORA) if lora else model for model in (auto, single)]
    one, other = (gradient(model, samples) for model in pair)
    assert float(other.norm()) > 1
    assert not torch.equal(one, other)
    assert float(nn.functional.cosine_similarity(one, other, dim=0)) > 0.99
    assert float(one.norm() / other.norm()) == pytest.approx(1, abs=0.05)


def test_a_forward_pass_computes_in_bfloat16_and_holds_float32_weights(
    auto: LanguageModel, single: LanguageModel
) -> None:
    samples = single.sample(4, seed=2, max_completion_length=6)
    for model, dtype in ((auto, torch.bfloat16), (single, torch.float32)):
        with torch.no_grad():
            forward = model.read(samples)
        assert forward.compute == dtype
        assert forward.weight is model.model.get_output_embeddings().weight
        assert forward.weight.dtype == torch.float32


def test_the_fused_activation_agrees_with_transformers_and_is_more_accurate() -> None:
    x = torch.linspace(-8, 8, 4001).bfloat16()

    def value_and_slope(gelu: nn.Module, given: Tensor) -> tuple[Tensor, Tensor]:
        given = given.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=given.dtype == torch.bfloat16):
            y = gelu(given)
        return y.detach(), torch.autograd.grad(y.sum(), given)[0]

    exact = value_and_slope(NewGELUActivation(), x.double())
    for one, other in zip(value_and_slope(FUSED_GELU, x.double()), exact, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    theirs, ours = value_and_slope(NewGELUActivation(), x), value_and_slope(FUSED_GELU, x)
    for one, other, truth in zip(ours, theirs, exact, strict=True):
        # The next product rounds both to 16 bits.
        errors = [(found.bfloat16().double() - truth).abs() for found in (one, other)]
        assert float(errors[0].max()) < 2**-8 * float(truth.abs().max())
        assert float(errors[0].mean()) <= 1.01 * float(errors[1].mean())


def test_the_activation_is_fused_only_within_the_block() -> None:
    model = models()["gpt2, tied"]()
    samples = model.sample(3, seed=0, max_completion_length=4)
    assert model.output_layer is not None  # the test pass runs in float32
    seen: list[type] = []
    for block in model.model.transformer.h:
        block.mlp.c_proj.register_forward_pre_hook(lambda m, _, block=block: seen.append(type(block.mlp.act)))
    with unchanged(model), torch.no_grad():
        model.logprob(samples)
    assert set(seen) == {nn.GELU}
    assert {type(block.mlp.act) for block in model.model.transformer.h} == {NewGELUActivation}


def accumulated_gradient(model: LanguageModel, samples: Samples, *, once: bool) -> dict[str, Tensor]:
    """The gradient of a weighted log-probability, accumulated over chunks of seven rows with a backward each."""
    parameters = dict(model.model.named_parameters())
    model.model.zero_grad()
    with model.cast_once() if once else nullcontext():
        for rows in model.chunks(samples, 7):
            chunk = samples.select(rows).trimmed()
            table = next_token(chunk, model.read(chunk)).policy
            (table.sum(-1) * torch.linspace(-1, 2, len(chunk))).sum().backward()
    return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize("name", models())
def test_weights_cast_once_get_the_same_gradient_as_weights_cast_in_every_pass(name: str) -> None:
    model = models()[name]()
    samples = model.sample(20, PROMPT if "embedded" in name else None, 0, max_completion_length=6)
    expected = accumulated_gradient(model, samples, once=False)
    with unchanged(model):
        with model.cast_once():
            layers = [m for m in model.model.modules() if type(m) in (nn.Linear, Conv1D)]
            assert {p.dtype for m in layers for p in m.parameters()} == {torch.bfloat16}
            assert model.memory == models()[name]().memory
        found = accumulated_gradient(model, samples, once=True)
    assert not any(m.sparse for m in model.model.modules() if isinstance(m, nn.Embedding))
    again = accumulated_gradient(model, samples, once=False)
    assert found.keys() == expected.keys()
    inner = model._inner
    summed_elsewhere = [inner.get_input_embeddings().weight, inner.get_output_embeddings().weight]
    for name, parameter in model.model.named_parameters():
        if name not in expected:
            continue
        assert torch.equal(again[name], expected[name]), name
        assert found[name].dtype == torch.float32
        assert bool(expected[name].any())
        if any(parameter is p for p in summed_elsewhere):
            # Summed in another order, all in float32.
            bound = 1e-6 * float(expected[name].norm())
            torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=bound)
        else:
            assert torch.equal(found[name], expected[name]), name


def test_gradients_of_weights_cast_once_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a 16-bit sum over four hundred chunks the last ones would be lost to rounding."""
    model = models()["gpt2, tied"]()
    samples = model.sample(3, seed=0, max_completion_length=4)
    one = accumulated_gradient(model, samples, once=True)
    chunks = 400 * model.chunks(samples, 7)
    monkeypatch.setattr(model, "chunks", lambda samples, size: chunks)
    many = accumulated_gradient(model, samples, once=True)
    for name, gradient in one.items():
        torch.testing.assert_close(many[name], 400 * gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max()))


def test_a_pass_without_gradient_uses_weights_cast_once(auto: LanguageModel) -> None:
    samples = auto.sample(4, seed=2, max_completion_length=6)
    with torch.no_grad():
        expected = auto.logprob(samples)
        with auto.cast_once():
            assert torch.equal(auto.logprob(samples), expected)
            drawn = auto.sample(4, seed=2, max_completion_length=6)
    assert torch.equal(drawn.proposal_logprob, samples.proposal_logprob)


# Frozen bases.


@pytest.mark.parametrize("name", [name for name in models() if "lora" not in name])
def test_a_frozen_base_keeps_its_distribution_and_its_fingerprint(name: str) -> None:
    model, frozen = models()[name](), models()[name]()
    samples = model.sample(30, seed=1, max_completion_length=6)
    known = model.fingerprint()
    assert frozen.freeze() is frozen
    layers = [m for m in frozen.model.modules() if type(m) in (nn.Linear, Conv1D)]
    assert {p.dtype for m in layers for p in m.parameters()} == {torch.bfloat16}
    assert frozen.model.get_input_embeddings().weight.dtype == torch.float32
    assert not any(p.requires_grad for p in frozen.model.parameters())
    assert frozen.fingerprint() == frozen.freeze().fingerprint() == known
    again = frozen.sample(30, seed=1, max_completion_length=6)
    assert torch.equal(again.tokens, samples.tokens)
    assert torch.equal(again.proposal_logprob, samples.proposal_logprob)
    with torch.no_grad():
        assert torch.equal(frozen.logprob(samples), model.logprob(samples))
    for use in (frozen.copy, frozen.with_lora, lambda: frozen.save_pretrained("nowhere")):
        with pytest.raises(UsageError, match="load it again"):
            use()


def test_in_one_precision_freezing_changes_no_weight(single: LanguageModel) -> None:
    frozen = single.copy().freeze()
    for one, other in zip(frozen.model.parameters(), single.model.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.dtype == torch.float32
        assert not one.requires_grad
    assert frozen.copy()._fingerprint is None


@pytest.mark.parametrize("given", [False, True])
def test_roles_freeze_the_base_and_keep_the_policy_in_float32(given: bool) -> None:
    model = models()["llama, tied"]()
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    policy = model.copy()
    roles = Roles(policy, base=model.freeze()) if given else Roles(policy)
    for name, parameter in roles.policy.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad
    with roles.use("base") as base:
        sizes = [sum(p.nbytes for p in m.model.model.layers.parameters()) for m in (base, policy)]
    assert sizes[0] < 0.6 * sizes[1]


# Caches with reserved memory.


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of cached tokens after each update of a reserved layer."""
    seen: list[int] = []
    update = ReservedLayer.update

    def counted(layer: ReservedLayer, *args: Any, **kwargs: Any) -> Any:
        found = update(layer, *args, **kwargs)
        seen.append(found[0].shape[2])
        return found

    monkeypatch.setattr(ReservedLayer, "update", counted)
    return seen


def draw_from(model: LanguageModel, prompts: str) -> Samples:
    return model.sample(300, PROMPTS[prompts], seed=4, max_completion_length=10)


def assert_same_samples(one: Samples, other: Samples) -> None:
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.mask, other.mask)
    torch.testing.assert_close(one.proposal_logprob, other.proposal_logprob, rtol=0, atol=1e-12)


@pytest.mark.parametrize("margin", [0, -5, 7], ids=["enough", "outgrown", "more than enough"])
@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_samples_do_not_depend_on_the_cache(
    architecture: str, prompts: str, margin: int, updates: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(architecture, "several_eos").copy()
    capacities: list[int] = []

    def with_margin(cache: Any, capacity: int, dtype: torch.dtype | None) -> None:
        capacities.append(capacity + margin)
        reserve(cache, capacity + margin, dtype)

    monkeypatch.setattr(sampling_module, "reserve", with_margin)
    rows = count_rows(model, monkeypatch)
    ours = draw_from(model, prompts)
    longest = model.encode_prompts(PROMPTS[prompts]).tokens.shape[1] + 9
    # At the end the cache holds every token but the last, and some rows have left the batch before.
    assert max(updates) == longest
    assert len(capacities) == 1
    assert (max(updates) > capacities[0]) == (margin < 0)
    assert rows[-1] < rows[1] <= 300
    updates.clear()
    monkeypatch.setattr(sampling_module, "reserve", lambda *args: None)
    theirs = draw_from(model, prompts)
    assert not updates
    assert_same_samples(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(model.logprob(ours), ours.proposal_logprob, rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", ["mistral", "lfm2", "mamba", "openai-gpt"])
def test_other_kinds_of_cache_layers_are_not_replaced(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(architecture, "several_eos")
    tokens = model.encode_prompts(PROMPTS["one"]).tokens
    with torch.no_grad():
        cache = getattr(model.model(tokens, use_cache=True), "past_key_values", None)
    layers = list(getattr(cache, "layers", []))
    reserve(cache, 20)
    for before, after in zip(layers, getattr(cache, "layers", []), strict=True):
        assert type(after) is (ReservedLayer if type(before) is DynamicLayer else type(before))
        assert (after is before) == (type(before) is not DynamicLayer)
    assert any(type(layer) is ReservedLayer for layer in getattr(cache, "layers", [])) == (architecture == "lfm2")


def keys_and_values(n: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, n, 3, tokens, 4, generator=generator)
    return keys, values


@pytest.mark.parametrize("capacity", [2, 5, 6, 20])
def test_a_reserved_layer_agrees_with_that_of_transformers(capacity: int) -> None:
    """Also when rows are repeated or removed, and when tokens exceed the capacity."""
    cache = DynamicCache()
    cache.update(*keys_and_values(2, 3, 0), 0)
    plain = DynamicLayer()
    plain.update(*keys_and_values(2, 3, 0))
    reserve(cache, capacity)
    reserved = cache.layers[0]
    assert type(reserved) is ReservedLayer
    n = 2
    for step, order in enumerate([None, [1, 0, 1, 1], None, [3, 0], None, None, [1]]):
        if order is not None:
            n = len(order)
            for layer in (reserved, plain):
                layer.reorder_cache(torch.tensor(order))
        found, expected = (layer.update(*keys_and_values(n, 1 + step % 2, step)) for layer in (reserved, plain))
        for ours, theirs in zip((*found, reserved.keys, reserved.values), 2 * expected, strict=True):
            assert torch.equal(ours, theirs)
        assert reserved.get_seq_length() == plain.get_seq_length() == expected[0].shape[2]
        assert reserved.get_mask_sizes(1) == plain.get_mask_sizes(1)
    assert reserved.get_seq_length() > 6


def test_keys_stay_in_place_up_to_the_capacity_and_are_copied_beyond() -> None:
    cache = DynamicCache()
    cache.update(*keys_and_values(2, 3, 0), 0)
    reserve(cache, 6)
    places = []
    for step in range(5):
        keys, _values = cache.update(*keys_and_values(2, 1, step), 0)
        places.append(keys.untyped_storage().data_ptr())
    assert len(set(places[:3])) == 1
    assert places[3] != places[2]


def test_a_reserved_layer_holds_the_dtype_that_attention_reads() -> None:
    cache = DynamicCache()
    keys, values = (x.bfloat16() for x in keys_and_values(2, 3, 0))
    cache.update(keys, values, 0)
    reserve(cache, 4, torch.float32)
    for _ in range(3):
        found = cache.update(*(x.bfloat16() for x in keys_and_values(2, 1, 1)), 0)
        assert {x.dtype for x in found} == {torch.float32}
    assert torch.equal(found[0][:, :, :3].bfloat16(), keys)
    assert torch.equal(found[1][:, :, :3].bfloat16(), values)
    assert found[0].shape[2] == 6
