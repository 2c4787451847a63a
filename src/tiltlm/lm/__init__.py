"""Language models: loading, sampling, log-probabilities, guides."""

from tiltlm.lm.forward import ForwardPass
from tiltlm.lm.guide import Guide
from tiltlm.lm.model import LanguageModel
from tiltlm.lm.processor import GuideProcessor
from tiltlm.lm.prompts import Prompts
from tiltlm.lm.roles import Roles
from tiltlm.lm.samples import Samples, SamplingSettings
from tiltlm.lm.token_scores import NextToken, next_token
from tiltlm.lm.transitions import Transitions

__all__ = [
    "ForwardPass",
    "Guide",
    "GuideProcessor",
    "LanguageModel",
    "NextToken",
    "Prompts",
    "Roles",
    "Samples",
    "SamplingSettings",
    "Transitions",
    "next_token",
]
