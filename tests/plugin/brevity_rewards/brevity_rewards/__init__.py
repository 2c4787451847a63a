"""Rewards for being brief: what somebody who has never heard of tiltlm would write for TRL."""

from __future__ import annotations


def brevity_reward(prompts, completions, **kwargs):
    """TRL's signature: 1.0 for a completion shorter than its prompt, else 0.0."""
    return [float(len(completion) < len(prompt)) for prompt, completion in zip(prompts, completions, strict=True)]


def mean_word_length(texts):
    """A plain function: characters per word, 0.0 for a text without words."""
    return [sum(map(len, text.split())) / max(1, len(text.split())) for text in texts]


def at_most(words):
    """A factory: the reward function for texts of at most so many words."""

    def reward(completions, **kwargs):
        return [float(len(completion.split()) <= words) for completion in completions]

    return reward


def brevity(texts, words=10):
    """A plain function with an option: the fraction of a budget of words that is left."""
    return [max(0.0, 1.0 - len(text.split()) / words) for text in texts]
