"""Features: what is measured on a text, one finite number each."""

from tiltlm.features.callables import callable_feature, feature, python_feature
from tiltlm.features.combine import all_of, any_of, negation, threshold
from tiltlm.features.feature import Batch, Feature, measure, measure_batch
from tiltlm.features.lexical import builtin_wordlists, contains, length, pronouns, regex, wordlist
from tiltlm.features.sentiment import sentiment
from tiltlm.features.spec import FeatureSpec, build_feature, run_file_form

__all__ = [
    "Batch",
    "Feature",
    "FeatureSpec",
    "all_of",
    "any_of",
    "build_feature",
    "builtin_wordlists",
    "callable_feature",
    "contains",
    "feature",
    "length",
    "measure",
    "measure_batch",
    "negation",
    "pronouns",
    "python_feature",
    "regex",
    "run_file_form",
    "sentiment",
    "threshold",
    "wordlist",
]
