"""Targets: the wanted distribution, and how it is fitted."""

from tiltlm.targets.base_sample import BaseSample, draw_base_sample, measure_samples
from tiltlm.targets.constrain import FitReport, FittedTarget, constrain, fit_target, report_fit, target_terms
from tiltlm.targets.moments import MomentFit, fit_moments
from tiltlm.targets.target import Target, Term, TiltedTarget, target_reward

__all__ = [
    "BaseSample",
    "FitReport",
    "FittedTarget",
    "MomentFit",
    "Target",
    "Term",
    "TiltedTarget",
    "constrain",
    "draw_base_sample",
    "fit_moments",
    "fit_target",
    "measure_samples",
    "report_fit",
    "target_reward",
    "target_terms",
]
