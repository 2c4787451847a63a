"""Guides: value functions of prefixes that reweight the base's next token."""

from tiltlm.guides.estimate import estimate_values, guide_toward
from tiltlm.guides.value import ValueFunction

__all__ = ["ValueFunction", "estimate_values", "guide_toward"]
