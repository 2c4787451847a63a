"""Guides: value functions of prefixes that reweight the base's next token."""

from tiltlm.guides.value import Twist, guide_toward

__all__ = ["Twist", "guide_toward"]
