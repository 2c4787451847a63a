"""Token scores and their gradients, computed in pieces, agree with the full softmax in float64.

The logits of all positions are never in memory together.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from enumerable import PROMPTS, random_guide, tiny_model
from tiltlm.lm import LanguageModel, Samples, forward, logit_strips, next_token
from tiltlm.lm.forward import ForwardPass
from tiltlm.lm.token_scores import NextToken

GRADIENTS = ("policy", "taught")
NAMES = (*GRADIENTS, "base", "kl", "guide", "gram")


@pytest.fixture(autouse=True, params=[1, 7, 1000])
def rows_of_a_piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "PIECE_BYTES", {"cpu": 1})
    for module in (forward, logit_strips):
        monkeypatch.setattr(module, "FEWEST_ROWS", request.param)


@pytest.fixture
def policy() -> LanguageModel:
    return tiny_model("gpt2", "several_eos").copy()


def other(model: LanguageModel) -> LanguageModel:
    """Another model of the same shape."""
    copied = model.copy()
    with torch.no_grad():
        for parameter in copied.model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)).to(parameter)
    return copied


def naive(samples: Samples, policy: LanguageModel, base: LanguageModel, guide: Any) -> dict[str, Tensor]:
    """The scores by a full softmax, row by row, without padding."""
    found = {name: torch.zeros(samples.tokens.shape, dtype=torch.float64) for name in NAMES}
    found["gram"] = torch.zeros(*samples.tokens.shape, 3, dtype=torch.float64)
    for i, (m, ids) in enumerate(zip(samples.prompt_index.tolist(), samples.completion_ids, strict=True)):
        prompt = samples.prompts.tokens[m][samples.prompts.mask[m]].tolist()
        tokens = torch.tensor([prompt + ids])
        pi, a = (model.model(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in (policy, base))
        states = guide.states(samples.tokens[i : i + 1])[0]
        weights = torch.stack([guide.logit_bias(states[t][None], t)[0] for t in range(len(ids))])
        g = (a + weights).log_softmax(-1).detach()
        at = torch.arange(len(ids)), torch.tensor(ids)
        directions = g.exp() - pi.exp(), torch.eye(pi.shape[-1], dtype=pi.dtype)[ids] - pi.exp()
        rows = {
            "policy": pi[at],
            "taught": (g.exp() * pi).sum(-1),
            "base": a[at],
            "kl": (pi.exp() * (pi - a)).sum(-1),
            "guide": g[at],
            "gram": torch.stack(
                [(directions[j] * directions[k]).sum(-1) for j, k in ((0, 0), (0, 1), (1, 1))], -1
            ).detach(),
        }
        for name, row in rows.items():
            found[name] = found[name].index_put((torch.full((len(ids),), i), torch.arange(len(ids))), row)
    return found


def ours(samples: Samples, policy: LanguageModel, base: LanguageModel, guide: Any) -> NextToken:
    with torch.no_grad():
        of_base = base.read(samples)
    return next_token(samples, policy.read(samples), of_base, guide)


def weighted(tables: Any, mask: Tensor) -> Tensor:
    """A sum over all scores that carry a gradient, with a random weight for each token."""
    generator = torch.Generator().manual_seed(4)
    weights = [torch.randn(mask.shape, dtype=torch.float64, generator=generator) for _ in GRADIENTS]
    total: Tensor = sum((w * tables[name]).sum() for w, name in zip(weights, GRADIENTS, strict=True))  # type: ignore[assignment]
    return total


def compare(policy: LanguageModel, base: LanguageModel) -> None:
    guide = random_guide(policy)
    samples = policy.sample(23, PROMPTS["several"], 0, max_completion_length=6)
    assert not samples.mask.all()
    expected, found = naive(samples, policy, base, guide), ours(samples, policy, base, guide)
    for name in NAMES:
        torch.testing.assert_close(getattr(found, name), expected[name], rtol=0, atol=1e-12)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    truth = torch.autograd.grad(weighted(expected, samples.mask), parameters, allow_unused=True)
    mine = torch.autograd.grad(weighted(vars(found), samples.mask), parameters, allow_unused=True)
    assert sum(float(g.abs().sum()) for g in truth if g is not None) > 1
    for one, two in zip(mine, truth, strict=True):
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            torch.testing.assert_close(one, two, rtol=0, atol=1e-11)


def test_full_tuning(policy: LanguageModel) -> None:
    assert policy.output_layer is not None
    compare(policy, other(policy))


def test_a_frozen_output_layer(policy: LanguageModel) -> None:
    """Forward then stores what the gradient needs."""
    for parameter in policy.model.get_output_embeddings().parameters():
        parameter.requires_grad_(False)
    compare(policy, other(policy))


def test_only_the_output_layer_is_tuned(policy: LanguageModel) -> None:
    policy.model.requires_grad_(False)
    policy.model.get_output_embeddings().weight.requires_grad_(True)
    compare(policy, other(policy))


def test_an_output_layer_with_a_bias(policy: LanguageModel) -> None:
    layer = policy.model.get_output_embeddings()
    layer.bias = nn.Parameter(torch.linspace(-0.5, 0.5, policy.vocab_size, dtype=torch.float64))
    assert policy.output_layer is layer
    compare(policy, other(policy))


class Capped(nn.Module):
    """A model around another that caps its logits, as Gemma 2 does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **arguments: Any) -> Any:
        output = self.inner(**arguments)
        output.logits = 3 * torch.tanh(output.logits / 3)
        return output


def test_a_cap_on_logits_is_detected_and_applied(policy: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = type(policy.model).forward

    def capped(self: Any, *args: Any, **arguments: Any) -> Any:
        output = plain(self, *args, **arguments)
        output.logits = 3 * torch.tanh(output.logits / 3)
        return output

    # The signature shows which arguments the model takes.
    capped.__signature__ = __import__("inspect").signature(plain)  # type: ignore[attr-defined]
    monkeypatch.setattr(type(policy.model), "forward", capped)
    assert policy.output_layer is None
    compare(policy, other(policy))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_common_families_are_scored_without_whole_logits(family: str) -> None:
    assert tiny_model(family).output_layer is not None


def test_an_adapter_on_the_output_layer_is_detected_and_applied(policy: LanguageModel) -> None:
    base = other(policy)
    tuned = policy.with_lora(r=2, target_modules=["lm_head", "c_attn"], ensure_weight_tying=True)
    assert tuned.output_layer is None
    with torch.no_grad():
        for name, parameter in tuned.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    compare(tuned, base)


def test_without_gradients_there_is_no_graph(policy: LanguageModel) -> None:
    samples = policy.sample(5, None, 0, max_completion_length=6)
    with torch.no_grad():
        assert not next_token(samples, policy.read(samples)).policy.requires_grad
    found = next_token(samples, policy.read(samples))
    assert found.policy.requires_grad
    assert (found.base, found.kl, found.guide, found.taught) == (None, None, None, None)


MEASURE = """
import sys, torch
from tiltlm.lm.forward import ForwardPass
from tiltlm.lm.token_scores import ScoreInputs, NextTokenFunction
from tiltlm.lm import Samples, SamplingSettings, Prompts
vocabulary, positions, naive = int(sys.argv[1]), 2048, sys.argv[2] == "naive"
def held(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) / 1024
torch.set_num_threads(1)
tokens = torch.randint(vocabulary, (64, positions // 64))
prompts = Prompts(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool), (None,))
samples = Samples(tokens, torch.ones_like(tokens, dtype=torch.bool), torch.zeros(tokens.shape),
                  torch.zeros(64, dtype=torch.long), prompts, SamplingSettings(), None)
hidden = torch.randn(positions, 16, requires_grad=True)
weight = torch.randn(vocabulary, 16, requires_grad=True)
open("/proc/self/clear_refs", "w").write("5")  # the peak of the imports does not count
before = held("VmHWM")
if naive:
    found = (hidden @ weight.T).log_softmax(-1).gather(-1, samples.flat_tokens[:, None])
else:
    forward = ForwardPass(hidden, weight, None, torch.float32)
    found = NextTokenFunction.apply(hidden, weight, None, ScoreInputs(samples, None, None, forward, True))[0]
found.sum().backward()
print(held("VmHWM") - before)
"""


def peak(vocabulary: int, how: str) -> float:
    """Peak MiB for values and gradients at 2,048 positions, in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(vocabulary), how], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def test_memory_does_not_hold_the_logits_of_all_positions(rows_of_a_piece: None) -> None:
    """At 20,000 words the logits of 2,048 positions are 156 MiB, and a plain log-softmax holds several of them."""
    logits = 2048 * 20_000 * 4 / 2**20
    assert peak(20_000, "ours") < 0.5 * logits
    assert peak(20_000, "naive") > 2 * logits


def test_a_forward_pass_knows_its_size() -> None:
    result = ForwardPass(torch.zeros(3, 4), torch.zeros(5, 4), None, torch.float32)
    assert (len(result), result.width) == (3, 5)
    assert ForwardPass(torch.zeros(3, 4), None, None, torch.float32).width == 4
