"""Rollouts: the seam between this library and whatever draws samples."""

from tiltlm.rollouts.local import LocalRollouts
from tiltlm.rollouts.proposal import Proposal
from tiltlm.rollouts.rollout import Rollouts, RolloutsOf

__all__ = ["LocalRollouts", "Proposal", "Rollouts", "RolloutsOf"]
