"""The next token's law, a few positions at a time: what training needs of it, without all logits at once.

The logits of N sequences of T tokens over V words are by far the largest tensor of a training step. Here a few rows of
them exist at a time, and backward makes them again, so that memory does not grow with N · T · V.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from tiltlm.lm.guide import Guide, Lift
from tiltlm.lm.precision import original_of
from tiltlm.lm.samples import Samples, SamplingSettings

# A strip of logits stays in a CPU's cache; a piece is as much, but of rows enough for a fast matrix product.
PIECE_BYTES = {"cpu": 4 * 2**20}
PIECE_BYTES_ELSEWHERE = 256 * 2**20
FEWEST_ROWS = 128
# For gradients of logits in 16 bits that are multiplied at once: less than what the C library maps anew every time.
HELD_BYTES = 31 * 2**20


@dataclass(frozen=True)
class ForwardPass:
    """What a model makes of P positions: ``hidden`` [P, H], and ``weight`` [V, H], ``bias`` [V] of its output layer.

    Without a weight ``hidden`` holds the logits [P, V] themselves. ``compute`` is the dtype of the product; ``lift`` is
    what a guide of the model's own adds to the logits.
    """

    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None
    compute: torch.dtype
    lift: Lift | None = None

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, lift: Lift | None = None) -> ForwardPass:
        """With the dtype in which the output layer would compute here, under autocast or not."""
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            return cls(hidden, weight, bias, torch.get_autocast_dtype(device), lift)
        return cls(hidden, weight, bias, (hidden if weight is None else weight).dtype, lift)

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def width(self) -> int:
        """The number V of tokens."""
        return self.hidden.shape[1] if self.weight is None else self.weight.shape[0]

    @property
    def piece_bytes(self) -> int:
        """Bytes of a strip in float32, and of a piece unless it has the fewest rows."""
        return PIECE_BYTES.get(self.hidden.device.type, PIECE_BYTES_ELSEWHERE)

    @property
    def piece_rows(self) -> int:
        """Positions of a piece at most."""
        return max(FEWEST_ROWS, self.piece_bytes // (4 * self.width))

    def pieces(self) -> Iterator[slice]:
        """Positions, as many at a time as a piece of logits holds."""
        return _split(slice(0, len(self)), self.piece_rows)

    def strips(self) -> Iterator[tuple[slice, slice]]:
        """Each strip, with the piece that it is of."""
        rows = max(1, self.piece_bytes // (4 * self.width))
        return ((piece, strip) for piece in self.pieces() for strip in _split(piece, rows))

    def logits(self, piece: slice) -> Tensor:
        """Logits [p, V] of these positions, in float32 or better."""
        found = self.hidden[piece]
        if self.weight is not None:
            found = linear(found, self.weight, self.bias)
        found = found if found.dtype == torch.float64 else found.float()
        return found if self.lift is None else found + self.lift.at(piece).to(found)

    def cast(self) -> ForwardPass:
        """The same with everything in the dtype in which the product is taken."""
        weight = self.weight.to(self.compute) if self.weight is not None else None
        bias = self.bias.to(self.compute) if self.bias is not None else None
        return ForwardPass(self.hidden.to(self.compute), weight, bias, self.compute, self.lift)


@dataclass(frozen=True)
class NextToken:
    """What one pass of policy and base says at each sampled token [N, T]; 0 where masked, None where not asked for.

    ``policy``, ``base`` and ``guide`` are log-probabilities of the token, in nats; ``kl`` is KL(π(·|x_<t)‖a(·|x_<t));
    ``taught`` is Σ_v g(v|x_<t) log π(v|x_<t), the guide's law g as a teacher; ``expected`` is log Σ_v a(v|x_<t)
    ψ(x_<t v), what the guide promises of the next token, less its ``log_scale``. ``gram`` [N, T, 3] has the inner
    products of g − π and 1_x − π over the vocabulary: of the first with itself, of both, of the second with itself.
    ``policy`` and ``taught`` carry a gradient.
    """

    policy: Tensor
    base: Tensor | None = None
    kl: Tensor | None = None
    guide: Tensor | None = None
    taught: Tensor | None = None
    expected: Tensor | None = None
    gram: Tensor | None = None


def next_token(
    samples: Samples, policy: ForwardPass, base: ForwardPass | None = None, guide: Guide | None = None
) -> NextToken:
    """Read the laws of policy and base at every sampled token; a ``guide`` reweights the base and needs one."""
    job = _Job(samples, base, guide, policy, torch.is_grad_enabled())
    found = _Laws.apply(  # type: ignore[no-untyped-call]
        policy.hidden, policy.weight, policy.bias, job
    )
    wanted = (True, *[base is not None] * 2, *[guide is not None] * 4)
    tables: Any = [_spread(x, samples) if asked else None for x, asked in zip(found, wanted, strict=True)]
    return NextToken(*tables)


def token_logprobs(
    samples: Samples, reading: ForwardPass, settings: SamplingSettings, guide: Guide | None = None
) -> Tensor:
    """Log-probabilities of the sampled tokens [N, T] under ``law`` and ``guide``, 0 where masked, with gradient."""
    if settings == SamplingSettings() and guide is None:
        return next_token(samples, reading).policy
    tokens, lift, reading = samples.flat_tokens, _lift(samples, guide), reading.cast()

    def piece_logprobs(piece: slice) -> Tensor:
        logits = reading.logits(piece)
        if lift is not None:
            logits = logits + lift.at(piece).to(logits)
        return settings.log_probabilities(logits).gather(-1, tokens[piece, None]).squeeze(-1)

    found = [checkpoint(piece_logprobs, piece, use_reentrant=False) for piece in reading.pieces()]
    return _spread(torch.cat(found), samples)


def _spread(values: Tensor, samples: Samples) -> Tensor:
    """Values [P, ...] of the sampled tokens as a table [N, T, ...]."""
    table = values.new_zeros(*samples.tokens.shape, *values.shape[1:])
    return table.index_put((samples.flat_rows, samples.flat_columns), values)


def _lift(samples: Samples, guide: Guide | None) -> Lift | None:
    return guide.lift(samples.tokens, samples.flat_rows, samples.flat_columns) if guide is not None else None


class _Job:
    """What a pass over the positions reads beside the policy; it carries no gradient."""

    def __init__(
        self, samples: Samples, base: ForwardPass | None, guide: Guide | None, policy: ForwardPass, gradient: bool
    ) -> None:
        self.tokens, self.guide = samples.flat_tokens, _lift(samples, guide)
        self.base, self.gradient = base.cast() if base else None, gradient
        self.compute, self.lift = policy.compute, policy.lift

    def policy(self, hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> ForwardPass:
        """The policy's reading, of the tensors that autograd knows."""
        return ForwardPass(hidden, weight, bias, self.compute, self.lift)

    def guide_law(self, base_logits: Tensor, piece: slice, out: Tensor | None) -> Tensor:
        """log g [p, V]; ``base_logits`` are lost."""
        assert self.guide is not None
        return torch.log_softmax(base_logits.add_(self.guide.at(piece)), -1, out=out)

    def at_tokens(self, law: Tensor, piece: slice) -> Tensor:
        return law.gather(-1, self.tokens[piece, None]).squeeze(-1)


class _Scratch:
    """Memory [s, V] for every intermediate result by its name, the same for all strips.

    Freed and allocated anew for each strip, it would fall apart into several times as much on a CPU.
    """

    def __init__(self, reading: ForwardPass) -> None:
        self.dtype = torch.float64 if reading.hidden.dtype == torch.float64 else torch.float32
        self.device, self.width, self.held = reading.hidden.device, reading.width, dict[str, Tensor]()
        self.rows = 0

    def start(self, strip: slice) -> None:
        """Memory for the rows of a strip from now on; none has more of them than the first."""
        self.rows = strip.stop - strip.start

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.held:
            self.held[name] = torch.empty(self.rows, self.width, dtype=self.dtype, device=self.device)
        return self.held[name][: self.rows]


class _Logits:
    """Logits of a reading, strip by strip; the product is taken for a piece at once."""

    def __init__(self, reading: ForwardPass) -> None:
        self.reading = reading
        self.room: Tensor | None = None
        self.product = reading.hidden

    def at(self, piece: slice, strip: slice, scratch: _Scratch) -> Tensor:
        """Logits [s, V] of a strip, in float32 or better, in memory that may be written to."""
        found = self._plain(piece, strip, scratch)
        return found if self.reading.lift is None else found.add_(self.reading.lift.at(strip).to(found))

    def _plain(self, piece: slice, strip: slice, scratch: _Scratch) -> Tensor:
        if self.reading.weight is None:
            return scratch["logits"].copy_(self.reading.hidden[strip])
        if strip.start == piece.start:
            self.product = self._multiplied(self.reading.hidden[piece], self.reading.weight)
        found = self.product[strip.start - piece.start : strip.stop - piece.start]
        return found if found.dtype == scratch.dtype else scratch["logits"].copy_(found)

    def _multiplied(self, hidden: Tensor, weight: Tensor) -> Tensor:
        if self.room is None:
            self.room = hidden.new_empty(len(hidden), len(weight))
        room, bias = self.room[: len(hidden)], self.reading.bias
        if hidden.dtype == torch.bfloat16 and hidden.device.type == "cpu":
            # The right factor is rearranged before every such product there: not the weight, then.
            room.copy_(torch.mm(weight, hidden.T).T)
            return room if bias is None else room.add_(bias)
        return torch.mm(hidden, weight.T, out=room) if bias is None else torch.addmm(bias, hidden, weight.T, out=room)


class _Rows:
    """Rows [r, V] of several strips, gathered for one product in its dtype."""

    def __init__(self, reading: ForwardPass, most: int) -> None:
        self.table = reading.hidden.new_empty(min(most, len(reading)), reading.width)
        self.start = self.stop = 0

    def has_room(self, strip: slice) -> bool:
        return bool(strip.stop - self.start <= len(self.table))

    def put(self, strip: slice, rows: Tensor) -> None:
        self.table[self.stop - self.start : strip.stop - self.start].copy_(rows)
        self.stop = strip.stop

    def take(self) -> tuple[slice, Tensor]:
        """The positions of all that was put since the last time, and their rows."""
        positions = slice(self.start, self.stop)
        self.start = self.stop
        return positions, self.table[: positions.stop - positions.start]


class _Laws(torch.autograd.Function):
    """The numbers of ``NextToken`` per position [P]; backward makes each piece of logits again.

    With z the logits, ∂ log π(x) / ∂z = 1_x − π and ∂ Σ_v g_v log π_v / ∂z = g − π. Where the output layer is frozen,
    forward has all that the gradient needs: both times the weight, [P, H].
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, job: _Job) -> tuple[Tensor, ...]:
        policy, base = job.policy(hidden, weight, bias).cast(), job.base
        learns = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        frozen = job.gradient and ctx.needs_input_grad[0] and weight is not None and not learns
        found: list[list[Tensor]] = [[] for _ in range(7)]
        pulls: list[list[Tensor]] = [[], []]
        scratch, ours, theirs = _Scratch(policy), _Logits(policy), _Logits(base) if base is not None else None
        held = [_Rows(policy, policy.piece_rows) for _ in range((1 if job.guide is None else 2) if frozen else 0)]
        for piece, strip in policy.strips():
            scratch.start(strip)
            law = torch.log_softmax(ours.at(piece, strip, scratch), -1, out=scratch["law"])
            found[0].append(job.at_tokens(law, strip))
            pi = torch.exp(law, out=scratch["pi"]) if base is not None or frozen else law
            if theirs is not None:
                base_logits = theirs.at(piece, strip, scratch)
                base_law = torch.log_softmax(base_logits, -1, out=scratch["other"])
                found[1].append(job.at_tokens(base_law, strip))
                found[2].append(torch.linalg.vecdot(pi, torch.sub(law, base_law, out=base_law)))
            if job.guide is not None:
                normalizer = job.at_tokens(base_logits, strip) - found[1][-1]
                guide_law = job.guide_law(base_logits, strip, scratch["other"])
                found[3].append(job.at_tokens(guide_law, strip))
                # Of two laws' normalizers any token tells, if the guide does not rule it out: so the likeliest.
                likeliest, place = guide_law.max(-1, keepdim=True)
                found[5].append((base_logits.gather(-1, place) - likeliest).squeeze(-1) - normalizer)
                g = guide_law.exp_()
                dot = torch.linalg.vecdot
                of_tokens = found[3][-1].exp(), found[0][-1].exp()
                found[6].append(gram(dot(g, g), dot(g, pi), dot(pi, pi), *of_tokens))
                # A token that the guide rules out weighs 0, and 0 · −inf is no number.
                found[4].append(torch.mul(g, law, out=law).masked_fill_(g == 0, 0.0).sum(-1))
            if frozen:
                assert policy.weight is not None
                for rows, law in zip(held, (pi, g) if job.guide is not None else (pi,), strict=True):
                    rows.put(strip, law)
                if strip.stop == piece.stop:
                    mean, *guided = (rows.take()[1] @ policy.weight for rows in held)
                    pulls[0].append(policy.weight[job.tokens[piece]] - mean)
                    pulls[1].extend(of_guide - mean for of_guide in guided)
        outputs = [torch.cat(part) if part else hidden.new_zeros(len(hidden)) for part in found]
        ctx.job, ctx.frozen, ctx.dtype = job, frozen, hidden.dtype
        # Where the weight is a copy for the length of a batch, its gradient is summed on the parameter itself.
        ctx.original = original_of(weight) if weight is not None else None
        # What was cast is no input, and is not cast again.
        was_cast = policy.hidden is not hidden or policy.weight is not weight
        ctx.cast = policy if was_cast and not frozen else None
        ctx.save_for_backward(*([torch.cat(p) for p in pulls if p] if frozen else [hidden, weight, bias]))
        ctx.mark_non_differentiable(*outputs[1:4], *outputs[5:])
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, on_policy: Tensor, *others: Tensor) -> tuple[Any, ...]:
        job: _Job = ctx.job
        on_taught = others[3]
        if ctx.frozen:
            to_token, *to_guide = ctx.saved_tensors
            total = on_policy[:, None] * to_token
            for pull in to_guide:
                total = total + on_taught[:, None] * pull
            return total.to(ctx.dtype), None, None, None
        hidden, weight, bias = ctx.saved_tensors
        policy, base = ctx.cast or job.policy(hidden, weight, bias), job.base
        of_bias = None
        # Many gradients at once, by vmap, are of another shape than the memory that is kept for one.
        functorch = torch._C._functorch
        many = functorch.is_batchedtensor(on_policy) or functorch.is_legacy_batchedtensor(on_policy)
        weight_dtype = (ctx.original if ctx.original is not None else weight).dtype if ctx.needs_input_grad[1] else None
        gradients = _Gradients(policy, ctx.dtype if ctx.needs_input_grad[0] else None, weight_dtype, many)
        if ctx.original is not None:
            gradients.of_weight = ctx.original.grad
        scratch, ours, theirs = _Scratch(policy), _Logits(policy), _Logits(base) if base is not None else None
        for piece, strip in policy.strips():
            scratch.start(strip)
            pull, both = on_policy[strip], on_policy[strip] + on_taught[strip]
            pi = torch.softmax(ours.at(piece, strip, scratch), -1, out=scratch["law"])
            of_logits = torch.mul(pi, -both[:, None], out=None if many else pi)
            if job.guide is not None and theirs is not None:
                g = job.guide_law(theirs.at(piece, strip, scratch), strip, scratch["other"]).exp_()
                of_logits = torch.addcmul(of_logits, g, on_taught[strip, None], out=None if many else of_logits)
            of_logits = of_logits.scatter_add_(-1, job.tokens[strip, None], pull[:, None])
            if ctx.needs_input_grad[2]:
                of_bias = _added(of_bias, of_logits.sum(0))
            gradients.take(strip, of_logits)
        of_hidden, of_weight = gradients.finish()
        if ctx.original is not None and of_weight is not None:
            ctx.original.grad, of_weight = of_weight, None
        return of_hidden, of_weight, of_bias, None


class _Gradients:
    """What gradients of logits make of hidden states [P, H] and of the weight [V, H], in these dtypes; None: not asked.

    They are gathered, in the dtype of the product, to be multiplied many rows at once. A product in 16 bits cannot add
    to a sum in 32, and with a large vocabulary that sum is larger than a piece: there more rows are gathered, and
    multiplied with some words at a time. ``of_weight`` may start from a sum.
    """

    def __init__(self, policy: ForwardPass, hidden: torch.dtype | None, weight: torch.dtype | None, many: bool) -> None:
        self.policy, self.hidden_dtype, self.weight_dtype = policy, hidden, weight
        self.of_hidden: list[Tensor] = []
        self.of_weight: Tensor | None = None
        self.adds = policy.hidden.dtype == weight
        enough = policy.piece_rows if self.adds else HELD_BYTES // (policy.hidden.element_size() * policy.width)
        self.rows = None if many else _Rows(policy, max(FEWEST_ROWS, enough))

    def take(self, strip: slice, of_logits: Tensor) -> None:
        """Take the gradient [s, V] of the logits of the next strip."""
        if self.rows is None:
            self._multiply(strip, of_logits)
            return
        if not self.rows.has_room(strip):
            self._multiply(*self.rows.take())
        self.rows.put(strip, of_logits)

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """Both, over all strips."""
        if self.rows is not None:
            self._multiply(*self.rows.take())
        return torch.cat(self.of_hidden) if self.of_hidden else None, self.of_weight

    def _multiply(self, positions: slice, of_logits: Tensor) -> None:
        weight = self.policy.weight
        if self.hidden_dtype is not None:
            part = of_logits.clone() if weight is None else of_logits @ weight
            self.of_hidden.append(part.to(self.hidden_dtype))
        if self.weight_dtype is None or weight is None:
            return
        hidden = self.policy.hidden[positions]
        if self.of_weight is None:
            if self.adds:
                self.of_weight = of_logits.T @ hidden
                return
            self.of_weight = hidden.new_zeros(weight.shape, dtype=self.weight_dtype)
        if self.adds:
            self.of_weight.addmm_(of_logits.T, hidden)
            return
        for words in _split(slice(0, len(weight)), max(FEWEST_ROWS, self.policy.piece_bytes // hidden[0].nbytes)):
            self.of_weight[words].add_(of_logits[:, words].T @ hidden)


def gram(theirs: Tensor, both: Tensor, ours: Tensor, guide: Tensor, policy: Tensor) -> Tensor:
    """``NextToken.gram`` [..., 3] from ⟨g, g⟩, ⟨g, π⟩, ⟨π, π⟩ and the probabilities of the token, each [...]."""
    return torch.stack([theirs - 2 * both + ours, guide - policy - both + ours, 1 - 2 * policy + ours], -1)


def _split(whole: slice, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, whole.stop)) for start in range(whole.start, whole.stop, size))


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)
