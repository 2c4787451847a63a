"""Every function of tensors keeps its shapes, on sizes that are all different, so that no two axes can be mixed up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import signatures as shaped
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

from tiltlm.features import build_feature
from tiltlm.lm import Guide, SamplingSettings
from tiltlm.objectives import BUILT_IN, guided
from tiltlm.targets import Term, TiltedTarget
from tiltlm.targets.target import Kind
from tiny_world import build_trainer, tiny_world

N, T, V, K, S = 11, 5, 13, 3, 7
KINDS: tuple[Kind, ...] = ("filter", "moment", "reward")
GENERATOR = torch.Generator().manual_seed(0)


def logs(*shape: int) -> Tensor:
    return -1 - torch.rand(shape, generator=GENERATOR)


def whole(below: int, *shape: int) -> Tensor:
    return torch.randint(below, shape, generator=GENERATOR)


def guide(length: int = T) -> tuple[Tensor, Tensor]:
    """Transitions and log ψ of a guide."""
    return whole(2 * S, S, V), logs(length + 1, 2 * S)


def target() -> TiltedTarget:
    return TiltedTarget(tuple(Term(build_feature({"contains": kind}), kind, coefficient=0.5) for kind in KINDS))


CASES: dict[str, Callable[[], Any]] = {
    "log_importance_weights": lambda: shaped.log_importance_weights(logs(N), logs(N)),
    "self_normalize": lambda: shaped.self_normalize(logs(N)),
    "from_one_sample": lambda: shaped.from_one_sample(*(logs(N) for _ in range(4)), torch.rand(N)),
    **{
        name: lambda objective=objective: shaped.coefficients(
            objective(), *(logs(N) for _ in range(5)), torch.arange(N) % 3, logs(N, T)
        )
        for name, objective in BUILT_IN.items()
    },
    "prefix_weights": lambda: shaped.prefix_weights(logs(N, T), logs(N, T)),
    "the model's own law": lambda: shaped.log_probabilities(SamplingSettings(), logs(N, T, V)),
    "a warped law": lambda: shaped.log_probabilities(SamplingSettings(0.7, top_k=5, top_p=0.9), logs(N, V)),
    "log_score": lambda: shaped.log_score(target(), logs(N), torch.ones(N, K)),
    "fit_moments": lambda: shaped.fit_moments(logs(101, K), logs(101), [-1.5, -1.4, -1.6]),
    "begin": lambda: shaped.begin(Guide(*guide()), N),
    "advance": lambda: shaped.advance(Guide(*guide()), whole(2 * S, N), whole(V, N)),
    "logit_bias, fewer rows than states": lambda: shaped.logit_bias(whole(2 * S, 2), 1, *guide()),
    "logit_bias, more rows than states": lambda: shaped.logit_bias(whole(2 * S, N), T, *guide()),
    "logit_bias_at": lambda: shaped.logit_bias_at(whole(2 * S, N), whole(T, N), *guide()),
    "draw": lambda: shaped.draw(logs(N, V), SamplingSettings(), 0),
}


@pytest.mark.parametrize("case", CASES)
def test_shapes_are_those_that_the_signature_states(case: str) -> None:
    CASES[case]()


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: shaped.prefix_weights(logs(N, T), logs(T, N)),
        lambda: shaped.logit_bias_at(whole(2 * S, N), whole(T, N + 1), *guide()),
        lambda: shaped.log_score(target(), logs(N), torch.ones(K, N)),
        lambda: shaped.log_importance_weights(logs(N, 1), logs(N)),
    ],
)
def test_swapped_and_missing_axes_are_noticed(mistake: Callable[[], Any]) -> None:
    with pytest.raises(TypeCheckError):
        mistake()


def test_training_calls_with_the_shapes_that_the_signature_states(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def call(*args: Tensor) -> Tensor:
        calls.append(args)
        return shaped.prefix_weights(*args)  # type: ignore[no-any-return]

    monkeypatch.setattr(guided, "prefix_weights", call)
    build_trainer(tiny_world(), method="guided", rule="guided", batch_size=50).train_step()
    assert calls
