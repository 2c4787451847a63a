"""Language models: load, sample, score."""

from tiltlm.lm.guide import Guide
from tiltlm.lm.model import LanguageModel
from tiltlm.lm.roles import Roles
from tiltlm.lm.samples import Law, Prompts, Samples, token_logprob

__all__ = ["Guide", "LanguageModel", "Law", "Prompts", "Roles", "Samples", "token_logprob"]
