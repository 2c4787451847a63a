"""Log-probabilities, KL and a guide's distillation term at every sampled token, without all logits at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tiltlm.lm.forward import ForwardPass
from tiltlm.lm.guide import Guide, LogitBias
from tiltlm.lm.logit_strips import GatheredRows, LogitGradients, Scratch, StripLogits
from tiltlm.lm.precision import original_of
from tiltlm.lm.samples import Samples, SamplingSettings


@dataclass(frozen=True)
class NextToken:
    """Scores at each sampled token [N, T]; 0 where masked, None where not computed.

    ``policy``, ``base`` and ``guide`` are log-probabilities of the token in nats. ``kl`` is KL(π(·|x_<t)‖a(·|x_<t)).
    ``taught`` is the distillation term Σ_v g(v|x_<t) log π(v|x_<t). ``expected`` is log Σ_v a(v|x_<t) ψ(x_<t v), the
    expected value of the next prefix, without the guide's ``log_scale``. ``gram`` [N, T, 3] holds the inner products
    of g − π and 1_x − π over the vocabulary: the first with itself, both, the second with itself. ``policy`` and
    ``taught`` carry a gradient.
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
    """Scores of policy and base at every sampled token; a ``guide`` reweights the base, so it needs ``base``."""
    job = Job(samples, base, guide, policy, torch.is_grad_enabled())
    found = NextTokenFunction.apply(  # type: ignore[no-untyped-call]
        policy.hidden, policy.weight, policy.bias, job
    )
    wanted = (True, *[base is not None] * 2, *[guide is not None] * 4)
    tables: Any = [_spread(x, samples) if asked else None for x, asked in zip(found, wanted, strict=True)]
    return NextToken(*tables)


def token_logprobs(
    samples: Samples, forward: ForwardPass, settings: SamplingSettings, guide: Guide | None = None
) -> Tensor:
    """log q of the sampled tokens [N, T] under ``settings`` and ``guide``, 0 where masked, with gradient."""
    if settings == SamplingSettings() and guide is None:
        return next_token(samples, forward).policy
    tokens, bias, forward = samples.flat_tokens, logit_bias(samples, guide), forward.cast()

    def piece_logprobs(piece: slice) -> Tensor:
        logits = forward.logits(piece)
        if bias is not None:
            logits = logits + bias.at(piece).to(logits)
        return settings.log_probabilities(logits).gather(-1, tokens[piece, None]).squeeze(-1)

    found = [checkpoint(piece_logprobs, piece, use_reentrant=False) for piece in forward.pieces()]
    return _spread(torch.cat(found), samples)


def _spread(values: Tensor, samples: Samples) -> Tensor:
    """Values [P, ...] of the sampled tokens as a table [N, T, ...]."""
    table = values.new_zeros(*samples.tokens.shape, *values.shape[1:])
    return table.index_put((samples.flat_rows, samples.flat_columns), values)


def logit_bias(samples: Samples, guide: Guide | None) -> LogitBias | None:
    return guide.bias_of(samples.tokens, samples.flat_rows, samples.flat_columns) if guide is not None else None


class Job:
    """The inputs of ``NextTokenFunction`` beside the policy; none carries a gradient."""

    def __init__(
        self, samples: Samples, base: ForwardPass | None, guide: Guide | None, policy: ForwardPass, gradient: bool
    ) -> None:
        self.tokens, self.guide = samples.flat_tokens, logit_bias(samples, guide)
        self.base, self.gradient = base.cast() if base else None, gradient
        self.compute, self.logit_bias = policy.compute, policy.logit_bias

    def policy(self, hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> ForwardPass:
        """The policy's forward pass, from the tensors that autograd tracks."""
        return ForwardPass(hidden, weight, bias, self.compute, self.logit_bias)

    def guide_logprobs(self, base_logits: Tensor, piece: slice, out: Tensor | None) -> Tensor:
        """log g [p, V]; overwrites ``base_logits``."""
        assert self.guide is not None
        return torch.log_softmax(base_logits.add_(self.guide.at(piece)), -1, out=out)

    def at_tokens(self, logprobs: Tensor, piece: slice) -> Tensor:
        return logprobs.gather(-1, self.tokens[piece, None]).squeeze(-1)


class NextTokenFunction(torch.autograd.Function):
    """The fields of ``NextToken`` per position [P]; backward computes each piece of logits again.

    With z the logits, ∂ log π(x) / ∂z = 1_x − π and ∂ Σ_v g_v log π_v / ∂z = g − π. If the output layer is frozen,
    forward keeps all that the gradient needs: both times the weight, [P, H].
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, job: Job) -> tuple[Tensor, ...]:
        policy, base = job.policy(hidden, weight, bias).cast(), job.base
        learns = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        frozen = job.gradient and ctx.needs_input_grad[0] and weight is not None and not learns
        found: list[list[Tensor]] = [[] for _ in range(7)]
        directions: list[list[Tensor]] = [[], []]
        scratch, ours, theirs = Scratch(policy), StripLogits(policy), StripLogits(base) if base is not None else None
        held = [
            GatheredRows(policy, policy.piece_rows) for _ in range((1 if job.guide is None else 2) if frozen else 0)
        ]
        for piece, strip in policy.strips():
            scratch.start(strip)
            logprobs = torch.log_softmax(ours.at(piece, strip, scratch), -1, out=scratch["policy"])
            found[0].append(job.at_tokens(logprobs, strip))
            pi = torch.exp(logprobs, out=scratch["pi"]) if base is not None or frozen else logprobs
            if theirs is not None:
                base_logits = theirs.at(piece, strip, scratch)
                base_logprobs = torch.log_softmax(base_logits, -1, out=scratch["other"])
                found[1].append(job.at_tokens(base_logprobs, strip))
                found[2].append(torch.linalg.vecdot(pi, torch.sub(logprobs, base_logprobs, out=base_logprobs)))
            if job.guide is not None:
                normalizer = job.at_tokens(base_logits, strip) - found[1][-1]
                guide_logprobs = job.guide_logprobs(base_logits, strip, scratch["other"])
                found[3].append(job.at_tokens(guide_logprobs, strip))
                # Any token with g > 0 shows the ratio of the normalizers; the likeliest is the most precise.
                likeliest, place = guide_logprobs.max(-1, keepdim=True)
                found[5].append((base_logits.gather(-1, place) - likeliest).squeeze(-1) - normalizer)
                g = guide_logprobs.exp_()
                dot = torch.linalg.vecdot
                of_tokens = found[3][-1].exp(), found[0][-1].exp()
                found[6].append(gram(dot(g, g), dot(g, pi), dot(pi, pi), *of_tokens))
                # g = 0 has weight 0, and 0 · −inf is not a number.
                found[4].append(torch.mul(g, logprobs, out=logprobs).masked_fill_(g == 0, 0.0).sum(-1))
            if frozen:
                assert policy.weight is not None
                for rows, probabilities in zip(held, (pi, g) if job.guide is not None else (pi,), strict=True):
                    rows.put(strip, probabilities)
                if strip.stop == piece.stop:
                    mean, *guided = (rows.take()[1] @ policy.weight for rows in held)
                    directions[0].append(policy.weight[job.tokens[piece]] - mean)
                    directions[1].extend(of_guide - mean for of_guide in guided)
        outputs = [torch.cat(part) if part else hidden.new_zeros(len(hidden)) for part in found]
        ctx.job, ctx.frozen, ctx.dtype = job, frozen, hidden.dtype
        # If the weight is a copy for the length of a batch, its gradient is summed on the parameter itself.
        ctx.original = original_of(weight) if weight is not None else None
        # A cast tensor is not an input, so it is kept instead of being cast again.
        was_cast = policy.hidden is not hidden or policy.weight is not weight
        ctx.cast = policy if was_cast and not frozen else None
        ctx.save_for_backward(*([torch.cat(p) for p in directions if p] if frozen else [hidden, weight, bias]))
        ctx.mark_non_differentiable(*outputs[1:4], *outputs[5:])
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, on_policy: Tensor, *others: Tensor) -> tuple[Any, ...]:
        job: Job = ctx.job
        on_taught = others[3]
        if ctx.frozen:
            to_token, *to_guide = ctx.saved_tensors
            total = on_policy[:, None] * to_token
            for direction in to_guide:
                total = total + on_taught[:, None] * direction
            return total.to(ctx.dtype), None, None, None
        hidden, weight, bias = ctx.saved_tensors
        policy, base = ctx.cast or job.policy(hidden, weight, bias), job.base
        of_bias = None
        # vmap computes many gradients at once, and their shape does not fit the memory kept for one.
        functorch = torch._C._functorch
        many = functorch.is_batchedtensor(on_policy) or functorch.is_legacy_batchedtensor(on_policy)
        weight_dtype = (ctx.original if ctx.original is not None else weight).dtype if ctx.needs_input_grad[1] else None
        gradients = LogitGradients(policy, ctx.dtype if ctx.needs_input_grad[0] else None, weight_dtype, many)
        if ctx.original is not None:
            gradients.of_weight = ctx.original.grad
        scratch, ours, theirs = Scratch(policy), StripLogits(policy), StripLogits(base) if base is not None else None
        for piece, strip in policy.strips():
            scratch.start(strip)
            of_token, both = on_policy[strip], on_policy[strip] + on_taught[strip]
            pi = torch.softmax(ours.at(piece, strip, scratch), -1, out=scratch["policy"])
            of_logits = torch.mul(pi, -both[:, None], out=None if many else pi)
            if job.guide is not None and theirs is not None:
                g = job.guide_logprobs(theirs.at(piece, strip, scratch), strip, scratch["other"]).exp_()
                of_logits = torch.addcmul(of_logits, g, on_taught[strip, None], out=None if many else of_logits)
            of_logits = of_logits.scatter_add_(-1, job.tokens[strip, None], of_token[:, None])
            if ctx.needs_input_grad[2]:
                of_bias = _added(of_bias, of_logits.sum(0))
            gradients.take(strip, of_logits)
        of_hidden, of_weight = gradients.finish()
        if ctx.original is not None and of_weight is not None:
            ctx.original.grad, of_weight = of_weight, None
        return of_hidden, of_weight, of_bias, None


def gram(theirs: Tensor, both: Tensor, ours: Tensor, guide: Tensor, policy: Tensor) -> Tensor:
    """``NextToken.gram`` [..., 3] from ⟨g, g⟩, ⟨g, π⟩, ⟨π, π⟩ and the probabilities of the token, each [...]."""
    return torch.stack([theirs - 2 * both + ours, guide - policy - both + ours, 1 - 2 * policy + ours], -1)


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)
