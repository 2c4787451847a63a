"""Sampling from the target itself, exactly or nearly, without tuning."""

from tiltlm.sampling.forecast import CurvePoint, Forecast, qrs_curve
from tiltlm.sampling.sampler import (
    SAMPLERS,
    Guided,
    Metropolis,
    QuasiRejection,
    Rejection,
    Resampling,
    Sampler,
    build_sampler,
    known_bound,
)
from tiltlm.sampling.target_proposal import Draws, Proposal, build_proposal
from tiltlm.sampling.target_sampler import TargetSampler, TargetSamples, sample_target

__all__ = [
    "SAMPLERS",
    "CurvePoint",
    "Draws",
    "Forecast",
    "Guided",
    "Metropolis",
    "Proposal",
    "QuasiRejection",
    "Rejection",
    "Resampling",
    "Sampler",
    "TargetSampler",
    "TargetSamples",
    "build_proposal",
    "build_sampler",
    "known_bound",
    "qrs_curve",
    "sample_target",
]
