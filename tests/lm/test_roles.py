"""Roles: base, policy and proposal each keep their own distribution, in as little memory as possible."""

from __future__ import annotations

import pytest
import torch

from enumerable import PROMPTS, tiny_model
from tiltlm.lm import LanguageModel, Roles, Samples

LORA_SETTINGS = {
    "all-linear": {"target_modules": "all-linear"},
    "embeddings": {"target_modules": ["wte", "c_attn"]},
    "tokens": {"target_modules": ["c_attn"], "trainable_token_indices": [1, 2]},
    "whole modules": {"target_modules": ["c_attn"], "modules_to_save": ["wpe"]},
}


def original() -> LanguageModel:
    return tiny_model("gpt2", "several_eos")


def lora_roles(settings: str = "all-linear") -> Roles:
    return Roles(original().copy().with_lora(r=2, **LORA_SETTINGS[settings]))


def full_roles() -> Roles:
    return Roles(original().copy())


@pytest.fixture(params=["full", *LORA_SETTINGS])
def roles(request) -> Roles:
    return full_roles() if request.param == "full" else lora_roles(request.param)


@pytest.fixture(scope="module")
def samples() -> Samples:
    return original().sample(20, PROMPTS["several"], seed=0, max_completion_length=6)


def change(roles: Roles, seed: int) -> None:
    """Change the trained parameters by large random steps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in roles.trainable().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.3)


@torch.no_grad()
def logprob(roles: Roles, role: str, samples: Samples) -> torch.Tensor:
    with roles.use(role) as model:
        return model.logprob(samples).sum(-1)


def storages(*models: LanguageModel) -> dict[int, int]:
    """Bytes of each storage that holds weights, by address."""
    tensors = [p for model in models for p in model.model.parameters()]
    return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in tensors}


def far_apart(one: torch.Tensor, other: torch.Tensor) -> bool:
    return float((one - other).abs().max()) > 0.1


def test_the_base_does_not_change_when_the_policy_changes(roles, samples):
    change(roles, 1)
    assert torch.equal(logprob(roles, "base", samples), original().logprob(samples).detach().sum(-1))
    assert far_apart(logprob(roles, "policy", samples), logprob(roles, "base", samples))


def test_the_base_does_not_change_when_an_optimizer_trains_the_policy(roles, samples):
    optimizer = torch.optim.Adam(roles.trainable().values(), lr=0.01)
    start = logprob(roles, "policy", samples).sum()
    for _ in range(5):
        with roles.use("base") as base, torch.no_grad():
            base.logprob(samples)
        (-roles.policy.logprob(samples).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert logprob(roles, "policy", samples).sum() > start + 0.1
    assert torch.equal(logprob(roles, "base", samples), original().logprob(samples).detach().sum(-1))


def test_the_proposal_is_the_policy_at_the_time_of_keep_proposal(roles, samples):
    assert not roles.has_proposal
    change(roles, 1)
    first = logprob(roles, "policy", samples)
    roles.keep_proposal()
    assert roles.has_proposal
    torch.testing.assert_close(logprob(roles, "proposal", samples), first)
    change(roles, 2)
    second = logprob(roles, "policy", samples)
    assert far_apart(first, second)
    torch.testing.assert_close(logprob(roles, "proposal", samples), first)
    torch.testing.assert_close(logprob(roles, "policy", samples), second)
    roles.keep_proposal()
    torch.testing.assert_close(logprob(roles, "proposal", samples), second)
    assert torch.equal(logprob(roles, "base", samples), original().logprob(samples).detach().sum(-1))


def test_each_role_samples_and_scores_under_its_own_distribution(roles):
    change(roles, 1)
    roles.keep_proposal()
    change(roles, 2)
    drawn = {}
    for role in ("base", "policy", "proposal"):
        with roles.use(role) as model, torch.no_grad():
            drawn[role] = model.sample(20, seed=3, max_completion_length=6)
            torch.testing.assert_close(model.logprob(drawn[role]), drawn[role].proposal_logprob, rtol=0, atol=1e-10)
    assert len({str(samples.completion_ids) for samples in drawn.values()}) == 3


def test_only_the_policy_is_trained_before_and_after_other_roles_were_used(roles, samples):
    names = set(roles.trainable())
    roles.keep_proposal()
    for role in ("base", "proposal"):
        logprob(roles, role, samples)
    assert set(roles.trainable()) == names
    roles.policy.logprob(samples).sum().backward()
    assert all(p.grad is not None for p in roles.trainable().values())
    others = [m for m in (roles._base, roles._proposal) if m is not roles.policy]
    for model in others:
        assert not any(p.requires_grad or p.grad is not None for p in model.model.parameters())
    for name, parameter in roles.policy.model.named_parameters():
        assert (name in names) == (parameter.grad is not None)


def test_an_error_within_a_role_restores_the_policy(samples):
    roles = lora_roles()
    change(roles, 1)
    roles.keep_proposal()
    change(roles, 2)
    policy = logprob(roles, "policy", samples)
    for role in ("base", "proposal"):
        with pytest.raises(KeyError), roles.use(role):
            raise KeyError
        torch.testing.assert_close(logprob(roles, "policy", samples), policy)


def test_with_lora_the_weights_are_in_memory_once():
    model = original().copy()
    weights = storages(model)
    roles = Roles(model.with_lora(r=2, **LORA_SETTINGS["all-linear"]))
    adapter = sum(p.numel() * p.element_size() for p in roles.trainable().values())

    def held() -> dict[int, int]:
        with roles.use("base") as base, roles.use("policy") as policy:
            return storages(base, policy, *([roles._proposal] if roles._proposal else []))

    assert roles.shared
    assert weights.items() <= held().items()
    assert sum(held().values()) == sum(weights.values()) + adapter
    for _ in range(3):
        roles.keep_proposal()
    assert weights.items() <= held().items()
    assert sum(held().values()) == sum(weights.values()) + 2 * adapter


def test_full_tuning_holds_frozen_copies_and_no_proposal_until_it_is_kept():
    roles = full_roles()
    one = sum(storages(original()).values())
    with roles.use("base") as base, roles.use("policy") as policy:
        assert not storages(base).keys() & storages(policy).keys()
        assert not any(p.requires_grad for p in base.model.parameters())
        assert sum(storages(base, policy).values()) == 2 * one
    assert roles.proposal_state() is None
    assert not roles.has_proposal
    roles.keep_proposal()
    with roles.use("proposal") as proposal:
        kept = storages(proposal)
        assert sum(storages(base, policy, proposal).values()) == 3 * one
        assert not any(p.requires_grad for p in proposal.model.parameters())
    roles.keep_proposal()
    with roles.use("proposal") as proposal:
        assert storages(proposal) == kept, "the copy is reused"


def test_a_given_base_is_not_copied(samples):
    base = original().copy()
    roles = Roles(base.copy(), base=base)
    with roles.use("base") as used:
        assert used is base
    change(roles, 1)
    assert torch.equal(logprob(roles, "base", samples), original().logprob(samples).detach().sum(-1))


def test_the_state_of_a_proposal_loads_into_other_roles(roles, samples):
    assert roles.proposal_state() is None
    change(roles, 1)
    roles.keep_proposal()
    change(roles, 2)
    state = {name: tensor.clone() for name, tensor in roles.proposal_state().items()}
    proposal = logprob(roles, "proposal", samples)
    fresh = full_roles() if not roles.shared else Roles(original().copy().with_lora(**lora_settings(roles)))
    assert not fresh.has_proposal
    fresh.load_proposal_state(state)
    assert fresh.has_proposal
    torch.testing.assert_close(logprob(fresh, "proposal", samples), proposal)
    assert torch.equal(logprob(fresh, "policy", samples), logprob(fresh, "base", samples)), "the policy is not touched"
    again = fresh.proposal_state()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    if roles.shared:
        assert len(state) == len(roles.trainable()), "an adapter's state holds nothing but the adapter"


def lora_settings(roles: Roles) -> dict[str, object]:
    config = roles.policy.model.peft_config["default"]
    names = ("r", "target_modules", "trainable_token_indices", "modules_to_save")
    return {name: getattr(config, name) for name in names}


def test_a_proposal_is_not_saved_with_the_policy(tmp_path):
    roles = lora_roles()
    roles.keep_proposal()
    roles.policy.save_pretrained(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if "proposal" in path.name]
    assert (tmp_path / "adapter_model.safetensors").is_file()
