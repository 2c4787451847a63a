"""Ground truth on a small model: all completions, and exact log Z, moments, divergences and gradients.

Log-probabilities are [N] in nats, one per completion in the list, and those of one prompt sum to 1 in probability. For
several prompts take one at a time, ``samples.select(samples.prompt_index == m)``. All helpers compute in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tiltlm.errors import UnreachableTargetError, UsageError
from tiltlm.lm import LanguageModel, Prompts, Samples, SamplingSettings
from tiltlm.objectives import Objective, Record
from tiltlm.targets import Target, measure_samples, target_reward

# 8 tokens and length 6 make 262,144 completions of a prompt at most.
MAX_VOCABULARY = 8
MAX_LENGTH = 6


def enumerate_completions(
    model: LanguageModel,
    prompts: str | Sequence[str] | Prompts | None = None,
    *,
    max_completion_length: int,
    settings: SamplingSettings | None = None,
) -> Samples:
    """Every completion of every prompt, once: ended by an EOS, or of full length; prompt after prompt.

    ``proposal_logprob`` holds the model's log-probabilities under ``settings`` (default: the model's own), so that
    exp(``sequence_logprob``) is the exact distribution of ``model.sample``. Raises UsageError for a vocabulary of more
    than 8 tokens or a length outside 1 to 6.
    """
    if model.vocab_size > MAX_VOCABULARY:
        raise UsageError(
            f"model: '{model.name}' has {model.vocab_size} tokens; at most {MAX_VOCABULARY} can be enumerated"
        )
    if not 1 <= max_completion_length <= MAX_LENGTH:
        raise UsageError(f"max_completion_length: {max_completion_length} must lie between 1 and {MAX_LENGTH}")
    if not isinstance(prompts, Prompts):
        prompts = model.encode_prompts(prompts)
    tokens, mask = _completions(model, max_completion_length)
    m, n = len(prompts.texts), len(tokens)
    listed = Samples(
        tokens=tokens.repeat(m, 1),
        mask=mask.repeat(m, 1),
        proposal_logprob=torch.zeros(m * n, max_completion_length, dtype=torch.float64, device=model.device),
        prompt_index=torch.arange(m, device=model.device).repeat_interleave(n),
        prompts=prompts,
        settings=settings or SamplingSettings(),
        tokenizer=model.tokenizer,
    )
    with torch.no_grad():
        return replace(listed, proposal_logprob=model.logprob(listed))


@dataclass(frozen=True)
class ExactTarget:
    """A target in full: N completions with log a [N], feature values [N, K] and log P [N], all float64.

    ``reward`` [N] is the target read as one.
    """

    samples: Samples
    base_logprob: Tensor
    features: Tensor
    target_logscore: Tensor
    reward: Tensor

    @property
    def log_z(self) -> float:
        """log Z = log Σ_x P(x)."""
        return float(self.target_logscore.logsumexp(0))

    @property
    def logprob(self) -> Tensor:
        """log p(x) = log P(x) − log Z [N]; −inf outside the support."""
        return self.target_logscore - self.log_z

    @property
    def moments(self) -> Tensor:
        """E_p[φ] [K]."""
        return exact_moments(self.logprob, self.features)

    def under(self, model: LanguageModel) -> Tensor:
        """log-probability [N] of the completions under a model."""
        with torch.no_grad():
            return model.sequence_logprob(self.samples)


def exact_target(base: LanguageModel, target: Target, samples: Samples) -> ExactTarget:
    """The target on the listed completions of one prompt, with ``base`` as a.

    Raises UnreachableTargetError when no completion lies in the support.
    """
    with torch.no_grad():
        base_logprob = base.sequence_logprob(samples)
    features = measure_samples(target.features, samples)
    score = target.log_score(base_logprob, features)
    if not bool((score > -math.inf).any()):
        raise UnreachableTargetError(f"none of the {len(samples)} completions has a target score above 0")
    return ExactTarget(samples, base_logprob, features, score, target_reward(target, base_logprob, features))


@dataclass(frozen=True)
class ExactConditional:
    """A target in full on the completions of C prompts: each prompt's truth, and means over the prompts."""

    prompts: tuple[ExactTarget, ...]

    @property
    def log_z(self) -> Tensor:
        """log Z of each prompt [C]."""
        return torch.tensor([truth.log_z for truth in self.prompts], dtype=torch.float64)

    @property
    def moments(self) -> Tensor:
        """E_{p_c}[φ] averaged over prompts [K]."""
        return torch.stack([truth.moments for truth in self.prompts]).mean(0)

    def kl(self, model: LanguageModel) -> Tensor:
        """KL(p_c‖model) of each prompt [C]."""
        return torch.tensor([exact_kl(truth.logprob, truth.under(model)) for truth in self.prompts])

    def tv(self, model: LanguageModel) -> Tensor:
        """TV(p_c, model) of each prompt [C]."""
        return torch.tensor([exact_tv(truth.logprob, truth.under(model)) for truth in self.prompts])


def exact_conditional(base: LanguageModel, target: Target, samples: Samples) -> ExactConditional:
    """The target on the listed completions of several prompts, one prompt at a time; see ``exact_target``."""
    rows = [samples.prompt_index == c for c in range(len(samples.prompts))]
    return ExactConditional(tuple(exact_target(base, target, samples.select(of_prompt)) for of_prompt in rows))


def exact_moments(logprob: Tensor, features: Tensor) -> Tensor:
    """E[φ] [K] of feature values [N, K] under log-probabilities [N]."""
    return logprob.double().exp() @ features.double()


def exact_kl(logprob: Tensor, reference_logprob: Tensor) -> float:
    """KL(r‖reference) = Σ_x r(x) (log r(x) − log reference(x)), inf where the reference lacks support."""
    own, reference = logprob.double(), reference_logprob.double()
    return float((own.exp() * torch.where(own > -math.inf, own - reference, 0.0)).sum())


def exact_tv(logprob: Tensor, reference_logprob: Tensor) -> float:
    """Total variation distance ½ Σ_x |r(x) − reference(x)|, between 0 and 1."""
    return 0.5 * float((logprob.double().exp() - reference_logprob.double().exp()).abs().sum())


def weighted_gradient(policy: LanguageModel, samples: Samples, weights: Tensor) -> dict[str, Tensor]:
    """Σ_x w(x) ∇ log π(x) by autograd, for every trainable parameter by name; memory bounded by chunks.

    ``weights`` [N], or [N, T] for each token. Rows of weight 0 add nothing, even where log π is −inf.
    """
    parameters = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for rows in policy.chunks(samples):
        logprob = policy.logprob(samples.select(rows), settings=SamplingSettings())
        weight = weights[rows.cpu()].to(logprob)
        weight = weight if weight.ndim == 2 else weight[:, None]
        surrogate = torch.where(weight != 0, weight * logprob, 0.0).sum()
        gradients = torch.autograd.grad(surrogate, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient
    return total


def kl_gradient(policy: LanguageModel, truth: ExactTarget) -> dict[str, Tensor]:
    """∇ KL(p‖π) = −Σ_x p(x) ∇ log π(x) for every trainable parameter by name."""
    return weighted_gradient(policy, truth.samples, -truth.logprob.exp())


def expected_gradient(
    objective: Objective,
    policy: LanguageModel,
    truth: ExactTarget,
    proposal_logprob: Tensor,
    log_z: float | None = None,
) -> dict[str, Tensor]:
    """The expected gradient of training: −Σ_x q(x) c(x) ∇ log π(x), with the objective's coefficients c.

    ``proposal_logprob`` is log q [N]; ``log_z`` the estimate that the objective is given (default: the truth). A
    batchwise objective gets all completions as one batch, so its baseline must not be a mean over samples.
    """
    with torch.no_grad():
        policy_logprob = policy.sequence_logprob(truth.samples)
    proposal = proposal_logprob.double().cpu()
    drawn = proposal > -math.inf  # other completions are never sampled, and their ratios are undefined
    record = Record(
        policy_logprob=policy_logprob[drawn],
        base_logprob=truth.base_logprob[drawn],
        proposal_logprob=proposal[drawn],
        target_logscore=truth.target_logscore[drawn],
        log_z=truth.log_z if log_z is None else log_z,
        reward=truth.reward[drawn],
    )
    if objective.batchwise:
        record = replace(record, advantage=objective.advantages(record))
    coefficients = objective.coefficients(record)
    mass = proposal[drawn].exp().reshape(-1, *[1] * (coefficients.ndim - 1))
    return weighted_gradient(policy, truth.samples.select(drawn), -mass * coefficients)


def _completions(model: LanguageModel, length: int) -> tuple[Tensor, Tensor]:
    """Tokens and mask, each [N, T], of all completions, grown token by token."""
    vocabulary = torch.arange(model.vocab_size, device=model.device)
    eos_ids = torch.tensor(model.eos_ids, dtype=torch.long, device=model.device)
    open_rows = torch.empty(1, 0, dtype=torch.long, device=model.device)
    finished: list[Tensor] = []
    for _ in range(length):
        grown = torch.cat(
            [open_rows.repeat_interleave(len(vocabulary), 0), vocabulary.repeat(len(open_rows))[:, None]], 1
        )
        ended = torch.isin(grown[:, -1], eos_ids)
        finished.append(grown[ended])
        open_rows = grown[~ended]
    finished.append(open_rows)
    widths = torch.cat([torch.full((len(rows),), rows.shape[1], device=model.device) for rows in finished])
    tokens = [torch.nn.functional.pad(rows, (0, length - rows.shape[1]), value=model.pad_id) for rows in finished]
    return torch.cat(tokens), torch.arange(length, device=model.device) < widths[:, None]
