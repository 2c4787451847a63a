"""Guides: value functions of prefixes that reweight the base's next token."""

from tiltlm.guides.value import ValueFunction, guide_toward

__all__ = ["ValueFunction", "guide_toward"]
