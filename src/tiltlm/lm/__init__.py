"""Language models: load, sample, score."""

from tiltlm.lm.guide import Guide
from tiltlm.lm.model import LanguageModel, token_logprob
from tiltlm.lm.roles import Roles
from tiltlm.lm.samples import Law, Prompts, Samples

__all__ = ["Guide", "LanguageModel", "Law", "Prompts", "Roles", "Samples", "token_logprob"]
