"""The one idea: every method is a rule for the coefficient of ∇ log π at each sample."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from tiltlm.errors import UsageError
from tiltlm.objectives.record import Record

Self = TypeVar("Self", bound="Objective")


@dataclass(frozen=True)
class Estimators:
    """K unbiased estimators of one gradient: ``distillation`` and ``residual`` weights [K, N, T], 0 where masked.

    Each is Σ_t D_t Σ_v g(v|x_<t) ∇ log π(v|x_<t) + Σ_t R_t ∇ log π(x_t|x_<t) with its own D and R.
    """

    distillation: Tensor
    residual: Tensor


class Objective(ABC):
    """A rule for the coefficient c_i in   gradient = Σ_i c_i ∇ log π(x_i),   x_i ~ q.

    A subclass gives itself a ``name`` and defines ``coefficients``. The class attributes and properties declare what
    the trainer must know; the defaults are safe for any objective. What depends on a setting is a property.
    """

    # How reports and run files call it.
    name: ClassVar[str] = ""
    # The proposal rule of runs that name none, and whether the method allows no other.
    default_proposal: ClassVar[str] = "on_policy"
    only_on_policy: ClassVar[bool] = False
    # Coefficients depend on the whole batch: ``advantages`` is called once, before any update on it.
    batchwise: ClassVar[bool] = False
    # Advantages are taken against a critic, a value head on the policy that learns beside it.
    has_critic: ClassVar[bool] = False
    # A guide is distilled: every record has one, and ``token_loss`` gets its distillation term.
    distills: ClassVar[bool] = False
    # The policy keeps the guide as a part of its own distribution.
    keeps_guide: ClassVar[bool] = False
    # The target is read as a reward to maximize, so no moment can be stated.
    maximizes_reward: ClassVar[bool] = False
    # Optimizer steps on each batch: what the method does by itself, and the most that it allows (None: no limit).
    default_iterations: ClassVar[int] = 1
    max_iterations: ClassVar[int | None] = None
    # A row with P = 0 has coefficient 0, whatever its log-probabilities: no pass over it is needed.
    zero_outside_support: ClassVar[bool] = False
    # A dataclass field that ``adapted`` changes from batch to batch; None: nothing changes.
    adaptive_field: ClassVar[str | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for method, declared in (("advantages", "batchwise"), ("returns", "has_critic"), ("value_loss", "has_critic")):
            if (getattr(cls, method) is not getattr(Objective, method)) != getattr(cls, declared):
                raise UsageError(
                    f"objective {cls.__name__}: {declared} = {getattr(cls, declared)} does not fit its method "
                    f"{method}(); define the method and set the class attribute to True, or do neither"
                )

    @property
    def needs_full_support(self) -> str | None:
        """Why this objective cannot match a target with P = 0 on some texts; None where it can."""
        return None

    @property
    def zero_without_advantage(self) -> bool:
        """Whether a row with advantage 0 has coefficient 0, whatever its log-probabilities."""
        return False

    @property
    def advantages_read_base(self) -> bool:
        """Whether ``advantages`` reads log a or log P."""
        return True

    @property
    def normalized_by_replay(self) -> bool:
        """Whether log Z comes from the replay buffer's own samples where there is one."""
        return False

    @property
    def moment_feedback(self) -> float:
        """How strongly the guide's coefficients follow the gap between moments and goals; 0: not at all."""
        return 0.0

    @abstractmethod
    def coefficients(self, record: Record) -> Tensor:
        """One coefficient per sequence [N], or per token [N, T]; a positive one raises the sample's probability.

        The N sequences may be part of a batch, as many as fit in memory: a coefficient depends on its own row and,
        through ``record.advantage``, on the batch.
        """

    def advantages(self, record: Record) -> Tensor:
        """What the whole batch says of each sequence [N], or token [N, T]; of a ``batchwise`` objective."""
        return torch.zeros_like(record.policy_logprob)

    def returns(self, record: Record) -> Tensor:
        """The critic's goal at each token [N, T]; of an objective that ``has_critic``."""
        return torch.zeros_like(record.policy_logprob)

    def value_loss(self, values: Tensor, before: Tensor, returns: Tensor) -> Tensor:
        """The critic's loss at each token [N, T], with gradient in ``values``; of one that ``has_critic``.

        ``before`` are the values before any update on the batch.
        """
        return torch.zeros_like(values)

    def token_loss(self, record: Record, coefficients: Tensor, policy: Tensor, guide: Tensor | None) -> Tensor:
        """The surrogate loss of each token [N, T] or sequence [N], whose gradient is −c ∇ log π.

        ``policy`` [N, T] is log π of the sampled tokens, with gradient. Where a guide is distilled, ``guide`` [N, T] is
        Σ_v g(v|x_<t) log π(v|x_<t), with gradient.
        """
        return -coefficients * (policy.sum(-1) if coefficients.ndim == 1 else policy)

    def estimators(self, record: Record) -> Estimators | None:
        """The unbiased estimators that this objective combines by their variances; None where there is only one."""
        return None

    def adapted(self: Self, record: Record) -> Self:
        """The objective for the next batch, with ``adaptive_field`` moved by the record of this one."""
        return self

    def state_dict(self) -> dict[str, float]:
        """What ``adapted`` has changed, for a checkpoint."""
        return {} if self.adaptive_field is None else {"adaptive_value": getattr(self, self.adaptive_field)}

    def with_state_dict(self: Self, state: dict[str, float]) -> Self:
        """The same objective with the state of a checkpoint."""
        if self.adaptive_field is None:
            return self
        changed: Any = self  # a dataclass, as every objective with an adaptive field
        loaded: Self = replace(changed, **{self.adaptive_field: state["adaptive_value"]})
        return loaded
