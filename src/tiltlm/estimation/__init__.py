"""What samples tell about target and policy, each number with its standard error; pure functions of tensors."""

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
from tiltlm.estimation.partition import Partition, log_partition
from tiltlm.estimation.weights import (
    effective_sample_size,
    log_importance_weights,
    no_hit,
    pareto_k,
    pareto_k_threshold,
    self_normalize,
)

__all__ = [
    "Estimate",
    "Partition",
    "distinct_1",
    "distinct_n",
    "effective_sample_size",
    "entropy",
    "entropy_per_token",
    "kl_difference",
    "kl_from_target",
    "kl_policy_base",
    "log_importance_weights",
    "log_partition",
    "mean",
    "moment_under_policy",
    "moment_under_target",
    "no_hit",
    "pareto_k",
    "pareto_k_threshold",
    "perplexity",
    "ratio_of_means",
    "self_bleu_5",
    "self_normalize",
    "tv_difference",
    "tv_from_target",
    "weighted_mean",
]
