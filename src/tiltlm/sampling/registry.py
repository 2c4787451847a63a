"""The samplers by their names on the command line. Each class declares its own name; list it here."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from tiltlm.errors import UsageError, nearest
from tiltlm.sampling.guided_base import GuidedBase
from tiltlm.sampling.metropolis import Metropolis
from tiltlm.sampling.rejection import QuasiRejection, Rejection
from tiltlm.sampling.resampling import Resampling
from tiltlm.sampling.sampler import Sampler

SAMPLERS: dict[str, type[Sampler]] = {
    sampler.name: sampler for sampler in (Rejection, QuasiRejection, Resampling, Metropolis, GuidedBase)
}


def build_sampler(name: str, **settings: Any) -> Sampler:
    """The sampler of this name with its settings. Raises UsageError for an unknown name or setting."""
    if name not in SAMPLERS:
        raise UsageError(f"sampler: '{name}' is not known; {nearest(name, SAMPLERS)}")
    for key in settings:
        owners = [other for other, sampler in SAMPLERS.items() if key in [field.name for field in fields(sampler)]]
        if name not in owners:
            raise UsageError(f"{key}: a setting of {' and '.join(owners) or 'no sampler'}, not of {name}; leave it out")
    return SAMPLERS[name](**settings)
