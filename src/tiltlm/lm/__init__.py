"""Language models: load, sample, score."""

from tiltlm.lm.guide import Guide
from tiltlm.lm.model import LanguageModel
from tiltlm.lm.processor import GuideProcessor
from tiltlm.lm.prompts import Prompts
from tiltlm.lm.forward import NextToken, Reading, next_token
from tiltlm.lm.roles import Roles
from tiltlm.lm.samples import Law, Samples
from tiltlm.lm.transitions import Transitions

__all__ = [
    "Guide",
    "GuideProcessor",
    "LanguageModel",
    "Law",
    "NextToken",
    "Prompts",
    "Reading",
    "Roles",
    "Samples",
    "Transitions",
    "next_token",
]
