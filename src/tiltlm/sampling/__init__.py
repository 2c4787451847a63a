"""Samplers of the target itself, exact or approximate, without tuning."""

from tiltlm.sampling.forecast import CurvePoint, Forecast, qrs_curve
from tiltlm.sampling.guided_base import GuidedBase
from tiltlm.sampling.metropolis import Metropolis
from tiltlm.sampling.registry import SAMPLERS, build_sampler
from tiltlm.sampling.rejection import QuasiRejection, Rejection, known_bound
from tiltlm.sampling.resampling import Resampling
from tiltlm.sampling.sampler import Sampler
from tiltlm.sampling.target_proposal import Draws, TargetProposal, build_proposal
from tiltlm.sampling.target_sampler import TargetSampler, TargetSamples, sample_target

__all__ = [
    "SAMPLERS",
    "CurvePoint",
    "Draws",
    "Forecast",
    "GuidedBase",
    "Metropolis",
    "QuasiRejection",
    "Rejection",
    "Resampling",
    "Sampler",
    "TargetProposal",
    "TargetSampler",
    "TargetSamples",
    "build_proposal",
    "build_sampler",
    "known_bound",
    "qrs_curve",
    "sample_target",
]
