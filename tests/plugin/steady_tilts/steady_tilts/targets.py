"""A target that grows with a feature, and only up to a limit."""

import math

import torch

from tiltlm.features import length


class Capped:
    """P(x) = a(x) exp(strength · words) for texts of at most ``words`` words, 0 for longer ones."""

    def __init__(self, strength, words=None):
        self.strength, self.words = strength, words
        self.features = [length("words")]

    def log_score(self, base_logprob, features):
        score = base_logprob + self.strength * features[:, 0]
        return score if self.words is None else torch.where(features[:, 0] <= self.words, score, -math.inf)
