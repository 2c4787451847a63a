"""The next token's law, a few positions at a time: what training needs of it, without all logits at once.

The logits of N sequences of T tokens over V words are by far the largest tensor of a training step. Here a few rows of
them exist at a time, and backward makes them again, so that memory does not grow with N · T · V.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from tiltlm.lm.guide import Guide
from tiltlm.lm.precision import original_of
from tiltlm.lm.samples import Law, Samples

# A piece of logits that stays in a CPU's cache, but of rows enough for a fast matrix product.
PIECE_BYTES = {"cpu": 4 * 2**20}
PIECE_BYTES_ELSEWHERE = 256 * 2**20
FEWEST_ROWS = 128
# For gradients of logits in 16 bits that are multiplied at once.
HELD_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Reading:
    """What a model makes of P positions: ``hidden`` [P, H], and ``weight`` [V, H], ``bias`` [V] of its output layer.

    Without a weight ``hidden`` holds the logits [P, V] themselves. ``compute`` is the dtype of the product.
    """

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None
    compute: torch.dtype

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Reading:
        """With the dtype in which the output layer would compute here, under autocast or not."""
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            return cls(hidden, weight, bias, torch.get_autocast_dtype(device))
        return cls(hidden, weight, bias, (hidden if weight is None else weight).dtype)

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def width(self) -> int:
        """The number V of tokens."""
        return self.hidden.shape[1] if self.weight is None else self.weight.shape[0]

    def pieces(self) -> Iterator[slice]:
        """Positions, as many at a time as a piece of logits holds."""
        bound = PIECE_BYTES.get(self.hidden.device.type, PIECE_BYTES_ELSEWHERE)
        rows = max(FEWEST_ROWS, bound // (4 * self.width))
        return (slice(start, start + rows) for start in range(0, len(self), rows))

    def logits(self, piece: slice, out: Tensor | None = None) -> Tensor:
        """Logits [p, V] of these positions, in float32 or better; in ``out`` where it is given."""
        found = self.hidden[piece]
        if self.weight is not None:
            if out is not None and out.dtype == found.dtype and self.bias is None:
                return torch.mm(found, self.weight.T, out=out)
            found = linear(found, self.weight, self.bias)
        if out is not None:
            return out.copy_(found)
        return found if found.dtype == torch.float64 else found.float()

    def cast(self) -> Reading:
        """The same with everything in the dtype in which the product is taken."""
        weight = self.weight.to(self.compute) if self.weight is not None else None
        bias = self.bias.to(self.compute) if self.bias is not None else None
        return Reading(self.hidden.to(self.compute), weight, bias, self.compute)


@dataclass(frozen=True)
class NextToken:
    """What one pass of policy and base says at each sampled token [N, T]; 0 where masked, None where not asked for.

    ``policy``, ``base`` and ``guide`` are log-probabilities of the token, in nats; ``kl`` is KL(π(·|x_<t)‖a(·|x_<t));
    ``taught`` is Σ_v g(v|x_<t) log π(v|x_<t), the guide's law g as a teacher. ``policy`` and ``taught`` carry a
    gradient.
    """

    policy: Tensor
    base: Tensor | None = None
    kl: Tensor | None = None
    guide: Tensor | None = None
    taught: Tensor | None = None


def next_token(samples: Samples, policy: Reading, base: Reading | None = None, guide: Guide | None = None) -> NextToken:
    """Read the laws of policy and base at every sampled token; a ``guide`` reweights the base and needs one."""
    job = _Job(samples, base, guide, policy.compute, torch.is_grad_enabled())
    found = _Laws.apply(  # type: ignore[no-untyped-call]
        policy.hidden, policy.weight, policy.bias, job
    )
    wanted = (True, base is not None, base is not None, guide is not None, guide is not None)
    tables: Any = [_spread(x, samples) if asked else None for x, asked in zip(found, wanted, strict=True)]
    return NextToken(*tables)


def token_logprobs(samples: Samples, reading: Reading, law: Law, guide: Guide | None = None) -> Tensor:
    """Log-probabilities of the sampled tokens [N, T] under ``law`` and ``guide``, 0 where masked, with gradient."""
    if law == Law() and guide is None:
        return next_token(samples, reading).policy
    tokens, states, reading = samples.flat_tokens, _states(samples, guide), reading.cast()

    def piece_logprobs(piece: slice) -> Tensor:
        logits = reading.logits(piece)
        if guide is not None and states is not None:
            logits = logits + guide.log_weights_at(states[piece], samples.flat_columns[piece]).to(logits)
        return law.log_probabilities(logits).gather(-1, tokens[piece, None]).squeeze(-1)

    found = [checkpoint(piece_logprobs, piece, use_reentrant=False) for piece in reading.pieces()]
    return _spread(torch.cat(found), samples)


def _spread(values: Tensor, samples: Samples) -> Tensor:
    """Values [P] of the sampled tokens as a table [N, T]."""
    table = values.new_zeros(samples.tokens.shape)
    return table.index_put((samples.flat_rows, samples.flat_columns), values)


def _states(samples: Samples, guide: Guide | None) -> Tensor | None:
    if guide is None:
        return None
    return guide.states(samples.tokens)[samples.flat_rows, samples.flat_columns]


class _Job:
    """What a pass over the positions reads beside the policy; it carries no gradient."""

    def __init__(
        self, samples: Samples, base: Reading | None, guide: Guide | None, compute: torch.dtype, gradient: bool
    ) -> None:
        self.tokens, self.columns = samples.flat_tokens, samples.flat_columns
        self.base, self.guide, self.compute, self.gradient = base.cast() if base else None, guide, compute, gradient
        self.states = _states(samples, guide)

    def guide_law(self, base_logits: Tensor, piece: slice, out: Tensor | None) -> Tensor:
        """log g [p, V]; ``base_logits`` are lost."""
        assert self.guide is not None
        assert self.states is not None
        weights = self.guide.log_weights_at(self.states[piece], self.columns[piece])
        return torch.log_softmax(base_logits.add_(weights), -1, out=out)

    def at_tokens(self, law: Tensor, piece: slice) -> Tensor:
        return law.gather(-1, self.tokens[piece, None]).squeeze(-1)


class _Scratch:
    """Memory [p, V] for every intermediate result by its name, the same for all pieces.

    Freed and allocated anew for each piece, it would fall apart into several times as much on a CPU.
    """

    def __init__(self, reading: Reading) -> None:
        self.like = reading.hidden if reading.hidden.dtype == torch.float64 else torch.empty(0, dtype=torch.float32)
        self.device, self.width, self.held = reading.hidden.device, reading.width, dict[str, Tensor]()
        self.rows = 0

    def start(self, piece: slice, count: int) -> None:
        """Memory for the rows of a piece of ``count`` positions from now on."""
        self.rows = min(piece.stop, count) - piece.start

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.held:
            self.held[name] = torch.empty(self.rows, self.width, dtype=self.like.dtype, device=self.device)
        return self.held[name][: self.rows]


class _Laws(torch.autograd.Function):
    """The five numbers of ``NextToken`` per position [P]; backward makes each piece of logits again.

    With z the logits, ∂ log π(x) / ∂z = 1_x − π and ∂ Σ_v g_v log π_v / ∂z = g − π. Where the output layer is frozen,
    forward has all that the gradient needs: both times the weight, [P, H].
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, job: _Job
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        policy, base = Reading(hidden, weight, bias, job.compute).cast(), job.base
        learns = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        frozen = job.gradient and ctx.needs_input_grad[0] and weight is not None and not learns
        found: list[list[Tensor]] = [[], [], [], [], []]
        pulls: list[list[Tensor]] = [[], []]
        scratch = _Scratch(policy)
        for piece in policy.pieces():
            scratch.start(piece, len(policy))
            law = torch.log_softmax(policy.logits(piece, scratch["logits"]), -1, out=scratch["law"])
            found[0].append(job.at_tokens(law, piece))
            pi = torch.exp(law, out=scratch["pi"]) if base is not None or frozen else law
            if base is not None:
                base_logits = base.logits(piece, scratch["logits"])
                base_law = torch.log_softmax(base_logits, -1, out=scratch["other"])
                found[1].append(job.at_tokens(base_law, piece))
                found[2].append(torch.linalg.vecdot(pi, torch.sub(law, base_law, out=base_law)))
            if job.guide is not None:
                guide_law = job.guide_law(base_logits, piece, scratch["other"])
                found[3].append(job.at_tokens(guide_law, piece))
                g = guide_law.exp_()
                # A token that the guide rules out weighs 0, and 0 · −inf is no number.
                found[4].append(torch.mul(g, law, out=law).masked_fill_(g == 0, 0.0).sum(-1))
            if frozen:
                assert policy.weight is not None
                mean = pi.to(policy.weight) @ policy.weight
                pulls[0].append(policy.weight[job.tokens[piece]] - mean)
                if job.guide is not None:
                    pulls[1].append(g.to(policy.weight) @ policy.weight - mean)
        outputs = [torch.cat(part) if part else hidden.new_zeros(len(hidden)) for part in found]
        ctx.job, ctx.frozen, ctx.dtype = job, frozen, hidden.dtype
        # Where the weight is a copy for the length of a batch, its gradient is summed on the parameter itself.
        ctx.original = original_of(weight) if weight is not None else None
        # What was cast is no input, and is not cast again.
        was_cast = policy.hidden is not hidden or policy.weight is not weight
        ctx.cast = policy if was_cast and not frozen else None
        ctx.save_for_backward(*([torch.cat(p) for p in pulls if p] if frozen else [hidden, weight, bias]))
        ctx.mark_non_differentiable(*outputs[1:4])
        return tuple(outputs)  # type: ignore[return-value]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, on_policy: Tensor, _b: Any, _k: Any, _g: Any, on_taught: Tensor) -> tuple[Any, ...]:
        job: _Job = ctx.job
        if ctx.frozen:
            to_token, *to_guide = ctx.saved_tensors
            total = on_policy[:, None] * to_token
            for pull in to_guide:
                total = total + on_taught[:, None] * pull
            return total.to(ctx.dtype), None, None, None
        hidden, weight, bias = ctx.saved_tensors
        policy, base = ctx.cast or Reading(hidden, weight, bias, job.compute), job.base
        of_hidden: list[Tensor] = []
        of_bias = None
        of_weight = _WeightGradient(policy, weight, ctx.original) if ctx.needs_input_grad[1] else None
        scratch = _Scratch(policy)
        # Many gradients at once, by vmap, are of another shape than the memory that is kept for one.
        functorch = torch._C._functorch
        many = functorch.is_batchedtensor(on_policy) or functorch.is_legacy_batchedtensor(on_policy)
        for piece in policy.pieces():
            scratch.start(piece, len(policy))
            pull, both = on_policy[piece], on_policy[piece] + on_taught[piece]
            pi = torch.softmax(policy.logits(piece, scratch["logits"]), -1, out=scratch["law"])
            of_logits = torch.mul(pi, -both[:, None], out=None if many else pi)
            if job.guide is not None and base is not None:
                g = job.guide_law(base.logits(piece, scratch["logits"]), piece, scratch["other"]).exp_()
                of_logits = torch.addcmul(of_logits, g, on_taught[piece, None], out=None if many else of_logits)
            of_logits = of_logits.scatter_add_(-1, job.tokens[piece, None], pull[:, None])
            if ctx.needs_input_grad[2]:
                of_bias = _added(of_bias, of_logits.sum(0))
            of_logits = of_weight.hold(of_logits) if of_weight else of_logits.to(policy.hidden.dtype)
            if ctx.needs_input_grad[0]:
                part = of_logits.clone() if policy.weight is None else of_logits @ policy.weight
                of_hidden.append(part.to(hidden.dtype))
            if of_weight:
                of_weight.add(of_logits, piece)
        whole = of_weight.finish() if of_weight else None
        return torch.cat(of_hidden) if of_hidden else None, whole, of_bias, None


class _WeightGradient:
    """The sum over pieces of (∂/∂logits)ᵀ · hidden [V, H], in the dtype of the weight, or of its original.

    A product in 16 bits cannot add to a sum in 32, and with a large vocabulary that sum is larger than a piece: there
    the gradients of several pieces of logits are held, in 16 bits, and multiplied at once, some words at a time.
    """

    def __init__(self, policy: Reading, weight: Tensor, original: nn.Parameter | None) -> None:
        self.hidden, self.original = policy.hidden, original
        self.total = original.grad if original is not None else None
        self.shape, self.dtype = weight.shape, weight.dtype if original is None else original.dtype
        self.held: Tensor | None = None
        self.start = self.stop = 0
        if self.hidden.dtype != self.dtype:
            rows = min(len(self.hidden), max(FEWEST_ROWS, HELD_BYTES // (self.hidden.element_size() * policy.width)))
            self.held = self.hidden.new_empty(rows, policy.width)

    def hold(self, of_logits: Tensor) -> Tensor:
        """The gradient of a piece of logits [p, V] in the dtype of the product."""
        if self.held is None:
            return of_logits
        if self.stop - self.start + len(of_logits) > len(self.held):
            self._flush()
        place = self.held[self.stop - self.start :][: len(of_logits)]
        return place.copy_(of_logits)

    def add(self, of_logits: Tensor, piece: slice) -> None:
        """Take what ``hold`` gave into the sum."""
        if self.held is not None:
            self.stop += len(of_logits)
        elif self.total is None:
            self.total = of_logits.T @ self.hidden[piece]
        else:
            self.total.addmm_(of_logits.T, self.hidden[piece])

    def finish(self) -> Tensor | None:
        """The sum over all pieces; None where it has been added to the original's gradient."""
        if self.held is not None:
            self._flush()
        assert self.total is not None
        if self.original is None:
            return self.total
        self.original.grad = self.total
        return None

    def _flush(self) -> None:
        if self.held is None or self.stop == self.start:
            return
        of_logits, hidden = self.held[: self.stop - self.start], self.hidden[self.start : self.stop]
        first, self.start = self.total is None, self.stop
        if self.total is None:
            self.total = hidden.new_empty(self.shape, dtype=self.dtype)
        bound = PIECE_BYTES.get(hidden.device.type, PIECE_BYTES_ELSEWHERE)
        words = max(FEWEST_ROWS, bound // (hidden.element_size() * hidden.shape[1]))
        for start in range(0, len(self.total), words):
            part, product = self.total[start : start + words], of_logits[:, start : start + words].T @ hidden
            part.copy_(product) if first else part.add_(product)


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)
