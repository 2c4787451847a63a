"""Features: what is measured on a text, one finite number each."""

from tiltlm.features.automaton import Automaton
from tiltlm.features.batch import Batch
from tiltlm.features.callables import callable_feature, feature, python_feature
from tiltlm.features.classifier import classifier, reward_model
from tiltlm.features.code import code_feature
from tiltlm.features.feature import Feature, all_of, any_of, measure, measure_batch, negation, threshold
from tiltlm.features.json_schema import json_feature
from tiltlm.features.kinds import feature_kind
from tiltlm.features.lexical import builtin_wordlists, contains, length, pronouns, regex, wordlist
from tiltlm.features.perplexity import perplexity
from tiltlm.features.registry import FeatureSpec, build_feature, run_file_form
from tiltlm.features.sentiment import sentiment
from tiltlm.features.similarity import similarity

__all__ = [
    "Automaton",
    "Batch",
    "Feature",
    "FeatureSpec",
    "all_of",
    "any_of",
    "build_feature",
    "builtin_wordlists",
    "callable_feature",
    "classifier",
    "code_feature",
    "contains",
    "feature",
    "feature_kind",
    "json_feature",
    "length",
    "measure",
    "measure_batch",
    "negation",
    "perplexity",
    "pronouns",
    "python_feature",
    "regex",
    "reward_model",
    "run_file_form",
    "sentiment",
    "similarity",
    "threshold",
    "wordlist",
]
