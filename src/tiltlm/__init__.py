"""tiltlm: tune a language model toward a distribution that you state, and see how close it got."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tiltlm._version import __version__

if TYPE_CHECKING:
    from tiltlm.app.load import load_run
    from tiltlm.app.tune import Run, tune
    from tiltlm.errors import TiltError
    from tiltlm.estimation import Estimate
    from tiltlm.features import Feature, feature
    from tiltlm.lm import LanguageModel, Samples
    from tiltlm.objectives import Objective, Record
    from tiltlm.sampling import sample_target
    from tiltlm.targets import FittedTarget, Target, TiltedTarget, constrain
    from tiltlm.training.callbacks import Callback

# Imported on first use, so that `tiltlm --help` does not load torch.
_HOMES = {
    "Callback": "tiltlm.training.callbacks",
    "Estimate": "tiltlm.estimation",
    "Feature": "tiltlm.features",
    "FittedTarget": "tiltlm.targets",
    "LanguageModel": "tiltlm.lm",
    "Objective": "tiltlm.objectives",
    "Record": "tiltlm.objectives",
    "Run": "tiltlm.app.tune",
    "Samples": "tiltlm.lm",
    "Target": "tiltlm.targets",
    "TiltError": "tiltlm.errors",
    "TiltedTarget": "tiltlm.targets",
    "constrain": "tiltlm.targets",
    "feature": "tiltlm.features",
    "load_run": "tiltlm.app.load",
    "sample_target": "tiltlm.sampling",
    "tune": "tiltlm.app.tune",
}

__all__ = [
    "Callback",
    "Estimate",
    "Feature",
    "FittedTarget",
    "LanguageModel",
    "Objective",
    "Record",
    "Run",
    "Samples",
    "Target",
    "TiltError",
    "TiltedTarget",
    "__version__",
    "constrain",
    "feature",
    "load_run",
    "sample_target",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name == "features":  # this package has many small functions, which are not listed here
        return importlib.import_module("tiltlm.features")
    if name not in _HOMES:
        raise AttributeError(f"module 'tiltlm' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
