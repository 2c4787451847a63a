"""Estimates of target and policy from samples, each with its standard error; pure functions of tensors."""

from tiltlm.estimation.acceptance import (
    Closeness,
    acceptance_rate,
    accepted_closeness,
    chain_acceptance,
    chain_closeness,
    chain_repeats,
    log_beta_for_acceptance,
    log_beta_for_kl,
    proposal_closeness,
    resampled_closeness,
)
from tiltlm.estimation.conditional import PromptPartition, partition_for
from tiltlm.estimation.divergences import (
    kl_difference,
    kl_from_target,
    kl_policy_base,
    moment_under_policy,
    moment_under_target,
    tv_difference,
    tv_from_target,
)
from tiltlm.estimation.diversity import distinct_1, distinct_n, entropy, entropy_per_token, perplexity, self_bleu_5
from tiltlm.estimation.estimate import Estimate
from tiltlm.estimation.means import mean, ratio_of_means, weighted_mean
from tiltlm.estimation.mixture import mixture
from tiltlm.estimation.partition import Partition, log_partition
from tiltlm.estimation.strata import Strata
from tiltlm.estimation.weights import (
    effective_sample_size,
    log_importance_weights,
    no_hit,
    pareto_k,
    pareto_k_threshold,
    self_normalize,
)

__all__ = [
    "Closeness",
    "Estimate",
    "Partition",
    "PromptPartition",
    "Strata",
    "acceptance_rate",
    "accepted_closeness",
    "chain_acceptance",
    "chain_closeness",
    "chain_repeats",
    "distinct_1",
    "distinct_n",
    "effective_sample_size",
    "entropy",
    "entropy_per_token",
    "kl_difference",
    "kl_from_target",
    "kl_policy_base",
    "log_beta_for_acceptance",
    "log_beta_for_kl",
    "log_importance_weights",
    "log_partition",
    "mean",
    "mixture",
    "moment_under_policy",
    "moment_under_target",
    "no_hit",
    "pareto_k",
    "pareto_k_threshold",
    "partition_for",
    "perplexity",
    "proposal_closeness",
    "ratio_of_means",
    "resampled_closeness",
    "self_bleu_5",
    "self_normalize",
    "tv_difference",
    "tv_from_target",
    "weighted_mean",
]
