"""Targets: what distribution we want."""

from tiltlm.targets.constrain import BaseSample, FitReport, FittedTarget, constrain, fit_target, report_fit
from tiltlm.targets.moments import MomentFit, fit_moments
from tiltlm.targets.target import Target, Term, TiltedTarget

__all__ = [
    "BaseSample",
    "FitReport",
    "FittedTarget",
    "MomentFit",
    "Target",
    "Term",
    "TiltedTarget",
    "constrain",
    "fit_moments",
    "fit_target",
    "report_fit",
]
