"""The shapes of the functions of tensors, written as types that jaxtyping and beartype check at every call.

N sequences of T tokens from a vocabulary of V, K features, S states of a guide. The library itself states its shapes in
docstrings, and needs neither package.
"""

from dataclasses import replace

import torch
from beartype import beartype
from jaxtyping import Float, Float64, Int, jaxtyped
from torch import Tensor

from tiltlm import estimation
from tiltlm.estimation import Estimate
from tiltlm.lm import Guide, SamplingSettings, sampling
from tiltlm.objectives import GuideRecord, Objective, Record, TokenRecord
from tiltlm.objectives import prefix_weights as weights_of_prefixes
from tiltlm.targets import TiltedTarget, moments

shaped = jaxtyped(typechecker=beartype)
Logs = Float[Tensor, "N"]


@shaped
def log_importance_weights(score: Logs, proposal: Logs) -> Float64[Tensor, "N"]:
    return estimation.log_importance_weights(score, proposal)


@shaped
def self_normalize(log_weights: Logs) -> Float64[Tensor, "N"]:
    return estimation.self_normalize(log_weights)


@shaped
def from_one_sample(score: Logs, proposal: Logs, policy: Logs, base: Logs, feature: Logs) -> list[Estimate]:
    return [
        estimation.log_partition(score - proposal),
        estimation.effective_sample_size(score - proposal),
        estimation.moment_under_target(feature, score, proposal),
        estimation.moment_under_policy(feature, policy, proposal),
        estimation.kl_from_target(score, proposal, policy),
        estimation.kl_difference(score, proposal, policy),
        estimation.tv_from_target(score, proposal, policy),
        estimation.tv_difference(score, proposal, policy),
        estimation.kl_policy_base(policy, base, proposal),
        estimation.mean(feature),
        estimation.ratio_of_means(feature, -policy),
        estimation.weighted_mean(feature, self_normalize(score - proposal)),
        estimation.entropy(policy),
        estimation.perplexity(base, feature + 1),
    ]


@shaped
def coefficients(
    objective: Objective,
    policy: Logs,
    base: Logs,
    proposal: Logs,
    score: Logs,
    guide: Logs,
    prompts: Int[Tensor, "N"],
    tokens: Float[Tensor, "N T"],
) -> Logs | Float[Tensor, "N T"]:
    record = Record(policy, base, proposal, score, log_z=-1.0, reward=-score, prompt_index=prompts)
    record = replace(record, tokens=TokenRecord(tokens, tokens - 0.1, tokens + 0.1, tokens < 0, tokens))
    promises = torch.stack([guide] * (tokens.shape[1] + 1), 1)
    record = replace(record, guide=GuideRecord(tokens - 0.2, promises, promises[:, 1:]))
    if objective.batchwise:
        record = replace(record, advantage=objective.advantages(record))
    return objective.coefficients(record)


@shaped
def prefix_weights(guide_tokens: Float[Tensor, "N T"], proposal_tokens: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    return weights_of_prefixes(guide_tokens, proposal_tokens)


@shaped
def log_probabilities(law: SamplingSettings, logits: Float[Tensor, "*batch V"]) -> Float[Tensor, "*batch V"]:
    return law.log_probabilities(logits)


@shaped
def log_score(target: TiltedTarget, base: Logs, features: Float[Tensor, "N K"]) -> Float64[Tensor, "N"]:
    return target.log_score(base, features)


@shaped
def fit_moments(
    features: Float[Tensor, "N K"], log_weights: Logs, goals: list[float]
) -> tuple[Float64[Tensor, "K"], Float64[Tensor, "K K"]]:
    fit = moments.fit_moments(features, log_weights, goals, [f"feature {k}" for k in range(len(goals))])
    return fit.coefficients, fit.covariance


@shaped
def begin(guide: Guide, n: int) -> Int[Tensor, "{n}"]:
    return guide.begin(n)


@shaped
def advance(guide: Guide, states: Int[Tensor, "N"], tokens: Int[Tensor, "N"]) -> Int[Tensor, "N"]:
    return guide.advance(states, tokens)


@shaped
def logit_bias(
    states: Int[Tensor, "N"], t: int, transitions: Int[Tensor, "S V"], log_value_table: Float[Tensor, "read 2*S"]
) -> Float[Tensor, "N V"]:
    return Guide(transitions, log_value_table).logit_bias(states, t)


@shaped
def logit_bias_at(
    states: Int[Tensor, "P"],
    columns: Int[Tensor, "P"],
    transitions: Int[Tensor, "S V"],
    log_value_table: Float[Tensor, "read 2*S"],
) -> Float[Tensor, "P V"]:
    return Guide(transitions, log_value_table).logit_bias_at(states, columns)


@shaped
def draw(logits: Float[Tensor, "N V"], law: SamplingSettings, seed: int) -> tuple[Int[Tensor, "N"], Float[Tensor, "N"]]:
    return sampling.draw(logits, law, torch.Generator().manual_seed(seed))
