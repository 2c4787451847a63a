"""Log-probabilities, KL and distillation terms at every sampled token, without all logits in memory at once."""

from __future__ import annotations

from dataclasses import dataclass, fields
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
    """Scores at each sampled token [N, T], in nats; 0 where masked, None if not computed.

    ``policy``, ``base`` and ``guide`` are log-probabilities of the token. ``kl`` is KL(π(·|x_<t)‖a(·|x_<t)).
    ``taught`` is the distillation term Σ_v g(v|x_<t) log π(v|x_<t). ``expected`` is log Σ_v a(v|x_<t) ψ(x_<t v), the
    log of the expected value of the next prefix, without the guide's ``log_scale``. ``gram`` [N, T, 3] holds inner
    products over the vocabulary, without unit: of g − π with itself, of g − π with 1_x − π, of 1_x − π with itself.
    Only ``policy`` and ``taught`` carry a gradient.
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
    """Scores of policy and base at every sampled token; a ``guide`` needs ``base``, which it reweights."""
    inputs = ScoreInputs(samples, base, guide, policy, torch.is_grad_enabled())
    found = NextTokenFunction.apply(  # type: ignore[no-untyped-call]
        policy.hidden, policy.weight, policy.bias, inputs
    )
    wanted = (True, *[base is not None] * 2, *[guide is not None] * 4)
    tables: Any = [_as_table(x, samples) if computed else None for x, computed in zip(found, wanted, strict=True)]
    return NextToken(*tables)


def token_logprobs(
    samples: Samples, forward: ForwardPass, settings: SamplingSettings, guide: Guide | None = None
) -> Tensor:
    """Log-probability [N, T] of each sampled token under ``settings`` and ``guide``, 0 where masked, with gradient."""
    if settings == SamplingSettings() and guide is None:
        return next_token(samples, forward).policy
    tokens, bias, forward = samples.flat_tokens, logit_bias(samples, guide), forward.cast()

    def piece_logprobs(piece: slice) -> Tensor:
        logits = forward.logits(piece)
        if bias is not None:
            logits = logits + bias.at(piece).to(logits)
        return settings.log_probabilities(logits).gather(-1, tokens[piece, None]).squeeze(-1)

    found = [checkpoint(piece_logprobs, piece, use_reentrant=False) for piece in forward.pieces()]
    return _as_table(torch.cat(found), samples)


def _as_table(values: Tensor, samples: Samples) -> Tensor:
    """Values [P, ...] of the sampled tokens as a table [N, T, ...]."""
    table = values.new_zeros(*samples.tokens.shape, *values.shape[1:])
    return table.index_put((samples.flat_rows, samples.flat_columns), values)


def logit_bias(samples: Samples, guide: Guide | None) -> LogitBias | None:
    """The logit bias of ``guide`` at the sampled tokens; None without a guide."""
    return guide.bias_of(samples.tokens, samples.flat_rows, samples.flat_columns) if guide is not None else None


class ScoreInputs:
    """All inputs of ``NextTokenFunction`` but the policy's tensors; none carries a gradient."""

    def __init__(
        self, samples: Samples, base: ForwardPass | None, guide: Guide | None, policy: ForwardPass, gradient: bool
    ) -> None:
        self.tokens, self.guide = samples.flat_tokens, logit_bias(samples, guide)
        self.base, self.gradient = base.cast() if base else None, gradient
        self.compute, self.logit_bias = policy.compute, policy.logit_bias

    def policy(self, hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> ForwardPass:
        """The policy's forward pass, made of the tensors that autograd tracks."""
        return ForwardPass(hidden, weight, bias, self.compute, self.logit_bias)

    def guide_logprobs(self, base_logits: Tensor, piece: slice, out: Tensor | None) -> Tensor:
        """log g [p, V]; overwrites ``base_logits``."""
        assert self.guide is not None
        return torch.log_softmax(base_logits.add_(self.guide.at(piece)), -1, out=out)

    def at_tokens(self, logprobs: Tensor, piece: slice) -> Tensor:
        """Entries [p] of ``logprobs`` [p, V] at the sampled tokens."""
        return logprobs.gather(-1, self.tokens[piece, None]).squeeze(-1)


class NextTokenFunction(torch.autograd.Function):
    """The fields of ``NextToken`` at P positions [P]; backward computes each piece of logits again.

    With logits z, ∂ log π(x) / ∂z = 1_x − π and ∂ Σ_v g_v log π_v / ∂z = g − π. If the output layer is frozen, forward
    stores all that the gradient needs: both differences times the weight, [P, H].
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor | None, bias: Tensor | None, inputs: ScoreInputs
    ) -> tuple[Tensor, ...]:
        policy, base = inputs.policy(hidden, weight, bias).cast(), inputs.base
        tunes_layer = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        frozen = inputs.gradient and ctx.needs_input_grad[0] and weight is not None and not tunes_layer
        found: dict[str, list[Tensor]] = {field.name: [] for field in fields(NextToken)}
        to_token: list[Tensor] = []
        to_guide: list[Tensor] = []
        scratch, policy_strips = Scratch(policy), StripLogits(policy)
        base_strips = StripLogits(base) if base is not None else None
        guided = inputs.guide is not None
        gathered = [GatheredRows(policy, policy.piece_rows) for _ in range(2 if guided else 1)] if frozen else []
        for piece, strip in policy.strips():
            scratch.start(strip)
            logprobs = torch.log_softmax(policy_strips.at(piece, strip, scratch), -1, out=scratch["policy"])
            found["policy"].append(inputs.at_tokens(logprobs, strip))
            pi = torch.exp(logprobs, out=scratch["pi"]) if base is not None or frozen else logprobs
            if base_strips is not None:
                base_logits = base_strips.at(piece, strip, scratch)
                base_logprobs = torch.log_softmax(base_logits, -1, out=scratch["other"])
                found["base"].append(inputs.at_tokens(base_logprobs, strip))
                found["kl"].append(torch.linalg.vecdot(pi, torch.sub(logprobs, base_logprobs, out=base_logprobs)))
            if guided:
                normalizer = inputs.at_tokens(base_logits, strip) - found["base"][-1]
                guide_logprobs = inputs.guide_logprobs(base_logits, strip, scratch["other"])
                found["guide"].append(inputs.at_tokens(guide_logprobs, strip))
                # Any token with g > 0 gives the ratio of the normalizers; the likeliest gives it most precisely.
                highest, token = guide_logprobs.max(-1, keepdim=True)
                found["expected"].append((base_logits.gather(-1, token) - highest).squeeze(-1) - normalizer)
                g = guide_logprobs.exp_()
                dot = torch.linalg.vecdot
                of_tokens = found["guide"][-1].exp(), found["policy"][-1].exp()
                found["gram"].append(gram(dot(g, g), dot(g, pi), dot(pi, pi), *of_tokens))
                # Where g = 0 the term is 0, but 0 · −inf would be NaN.
                found["taught"].append(torch.mul(g, logprobs, out=logprobs).masked_fill_(g == 0, 0.0).sum(-1))
            if frozen:
                assert policy.weight is not None
                for rows, probabilities in zip(gathered, (pi, g) if guided else (pi,), strict=True):
                    rows.put(strip, probabilities)
                if strip.stop == piece.stop:
                    of_policy, *of_guide = (rows.take()[1] @ policy.weight for rows in gathered)
                    to_token.append(policy.weight[inputs.tokens[piece]] - of_policy)
                    to_guide.extend(mean - of_policy for mean in of_guide)
        outputs = [torch.cat(part) if part else hidden.new_zeros(len(hidden)) for part in found.values()]
        ctx.inputs, ctx.frozen, ctx.dtype = inputs, frozen, hidden.dtype
        # If the weight is a copy by ``cast_weights``, its gradient is summed on the parameter itself.
        ctx.original = original_of(weight) if weight is not None else None
        # A cast tensor is no input of this function, so it is stored instead of cast again.
        was_cast = policy.hidden is not hidden or policy.weight is not weight
        ctx.cast = policy if was_cast and not frozen else None
        stored = [torch.cat(part) for part in (to_token, to_guide) if part] if frozen else [hidden, weight, bias]
        ctx.save_for_backward(*stored)
        ctx.mark_non_differentiable(*outputs[1:4], *outputs[5:])
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, on_policy: Tensor, *others: Tensor) -> tuple[Any, ...]:
        inputs: ScoreInputs = ctx.inputs
        on_taught = others[3]
        if ctx.frozen:
            to_token, *to_guide = ctx.saved_tensors
            total = on_policy[:, None] * to_token
            for direction in to_guide:
                total = total + on_taught[:, None] * direction
            return total.to(ctx.dtype), None, None, None
        hidden, weight, bias = ctx.saved_tensors
        policy, base = ctx.cast or inputs.policy(hidden, weight, bias), inputs.base
        of_bias = None
        # Under vmap gradients have one more dimension, which the buffers do not have.
        functorch = torch._C._functorch
        batched = functorch.is_batchedtensor(on_policy) or functorch.is_legacy_batchedtensor(on_policy)
        weight_dtype = (ctx.original if ctx.original is not None else weight).dtype if ctx.needs_input_grad[1] else None
        gradients = LogitGradients(policy, ctx.dtype if ctx.needs_input_grad[0] else None, weight_dtype, batched)
        if ctx.original is not None:
            gradients.of_weight = ctx.original.grad
        scratch, policy_strips = Scratch(policy), StripLogits(policy)
        base_strips = StripLogits(base) if base is not None else None
        for piece, strip in policy.strips():
            scratch.start(strip)
            of_token, both = on_policy[strip], on_policy[strip] + on_taught[strip]
            pi = torch.softmax(policy_strips.at(piece, strip, scratch), -1, out=scratch["policy"])
            of_logits = torch.mul(pi, -both[:, None], out=None if batched else pi)
            if inputs.guide is not None and base_strips is not None:
                base_logits = base_strips.at(piece, strip, scratch)
                g = inputs.guide_logprobs(base_logits, strip, scratch["other"]).exp_()
                of_logits = torch.addcmul(of_logits, g, on_taught[strip, None], out=None if batched else of_logits)
            of_logits = of_logits.scatter_add_(-1, inputs.tokens[strip, None], of_token[:, None])
            if ctx.needs_input_grad[2]:
                of_bias = _added(of_bias, of_logits.sum(0))
            gradients.take(strip, of_logits)
        of_hidden, of_weight = gradients.finish()
        if ctx.original is not None and of_weight is not None:
            ctx.original.grad, of_weight = of_weight, None
        return of_hidden, of_weight, of_bias, None


def gram(guide_guide: Tensor, guide_policy: Tensor, policy_policy: Tensor, guide: Tensor, policy: Tensor) -> Tensor:
    """``NextToken.gram`` [..., 3] from ⟨g, g⟩, ⟨g, π⟩, ⟨π, π⟩ and the token's probabilities g(x), π(x), each [...]."""
    of_guide = guide_guide - 2 * guide_policy + policy_policy
    return torch.stack([of_guide, guide - policy - guide_policy + policy_policy, 1 - 2 * policy + policy_policy], -1)


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)
