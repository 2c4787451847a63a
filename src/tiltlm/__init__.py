"""tiltlm: tune a language model toward a distribution that you state, and see how close it got."""

__version__ = "0.1.0"
