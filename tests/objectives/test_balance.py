"""The mix of estimators: its shares are those of least variance, as told by the batches before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tiltlm.objectives import Estimators, MinimumVariance

N, T, V, K = 400, 3, 5, 4


def drawn(seed: int, scale: float = 1.0) -> tuple[Estimators, Tensor, Tensor]:
    """Estimators of some texts, their ``gram``, and what each form pulls on the logits [K, N, T, V]."""
    generator = torch.Generator().manual_seed(seed)
    pi, g = (torch.randn(N, T, V, generator=generator).double().softmax(-1) for _ in range(2))
    tokens = torch.randint(V, (N, T), generator=generator)
    of_guide, of_token = g - pi, torch.eye(V).double()[tokens] - pi
    lessons, corrections = (scale * torch.randn(K, N, T, generator=generator).double() for _ in range(2))
    lessons[:2] = 0.0
    gram = torch.stack(
        [(x * y).sum(-1) for x, y in ((of_guide, of_guide), (of_guide, of_token), (of_token, of_token))], -1
    )
    return Estimators(lessons, corrections), gram, lessons[..., None] * of_guide + corrections[..., None] * of_token


def balanced(*batches: tuple[Estimators, Tensor, Tensor]) -> MinimumVariance:
    balance = MinimumVariance()
    for estimators, gram, _ in batches:
        balance.add(estimators, gram)
        balance.settle()
    return balance


def spread(shares: Tensor, pulls: Tensor) -> Tensor:
    """The mean square [T] of what the mix pulls."""
    return torch.einsum("tk,kntv->ntv", shares, pulls).square().sum(-1).mean(0)


def test_no_other_shares_pull_less() -> None:
    batch = drawn(1)
    shares = balanced(batch).weights(T)
    assert shares is not None
    torch.testing.assert_close(shares.sum(-1), torch.ones(T).double())
    least = spread(shares, batch[2])
    generator = torch.Generator().manual_seed(2)
    for size in (0.1, 1.0):
        for _ in range(50):
            other = torch.randn(T, K, generator=generator).double() * size
            other = shares + other - other.mean(-1, keepdim=True)
            assert bool((spread(other, batch[2]) > least).all())
    alone = torch.stack([spread(one.expand(T, K), batch[2]) for one in torch.eye(K).double()])
    assert bool((least < 0.6 * alone.amin(0)).all())


def test_a_form_that_is_right_alone_is_taken_alone() -> None:
    estimators, gram, _ = drawn(1)
    estimators.distillation[3], estimators.residual[3] = 0.0, 0.0
    shares = balanced((estimators, gram, gram)).weights(T)
    torch.testing.assert_close(shares, torch.eye(K).double()[[3] * T])


@pytest.mark.parametrize("size", [1e-120, 1e120])
def test_the_size_of_one_form_does_not_hide_the_others(size: float) -> None:
    estimators, gram, _ = drawn(1)
    usual = balanced((estimators, gram, gram)).weights(T)
    assert usual is not None
    estimators.residual[1] *= size
    shares = balanced((estimators, gram, gram)).weights(T)
    assert shares is not None
    assert bool(shares.isfinite().all())
    torch.testing.assert_close(shares.sum(-1), torch.ones(T).double())
    if size < 1:
        torch.testing.assert_close(shares[:, 1], torch.ones(T).double())
    else:
        assert float(shares[:, 1].abs().max()) < 1e-100
        without = usual[:, [0, 2, 3]]
        assert float((shares[:, [0, 2, 3]] - without / without.sum(-1, keepdim=True)).abs().max()) < 0.2


def test_pieces_of_a_batch_are_the_batch() -> None:
    (estimators, gram, _), whole, pieces = drawn(1), MinimumVariance(), MinimumVariance()
    whole.add(estimators, gram)
    # A piece may be shorter, if its texts are.
    estimators.distillation[:, :100, 2], estimators.residual[:, :100, 2] = 0.0, 0.0
    whole = balanced((estimators, gram, gram))
    for rows, length in ((slice(0, 100), 2), (slice(100, N), T)):
        pieces.add(
            Estimators(estimators.distillation[:, rows, :length], estimators.residual[:, rows, :length]),
            gram[rows, :length],
        )
    assert pieces.weights(T) is None
    pieces.settle()
    torch.testing.assert_close(pieces.weights(T), whole.weights(T))


def test_later_batches_count_more() -> None:
    first, last = drawn(1), drawn(2)
    moments = [balanced(batch).moments for batch in (first, last)]
    assert moments[0] is not None
    assert moments[1] is not None
    many = balanced(first, *[last] * 40).moments
    torch.testing.assert_close(many, 0.9**40 * moments[0] + (1 - 0.9**40) * moments[1])


def test_what_is_forgotten_does_not_count() -> None:
    first, other = drawn(1), drawn(2)
    balance = balanced(first)
    before = balance.weights(T)
    balance.add(other[0], other[1])
    balance.discard()
    balance.settle()
    torch.testing.assert_close(balance.weights(T), before, rtol=0, atol=0)


def test_longer_and_shorter_texts_have_shares_too() -> None:
    balance = balanced(drawn(1))
    three, five, two = balance.weights(T), balance.weights(5), balance.weights(2)
    assert three is not None
    torch.testing.assert_close(five, three[[0, 1, 2, 2, 2]])
    torch.testing.assert_close(two, three[:2])
