"""From wanted moments to a fitted target and its report, and whether the report's standard errors are right."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from enumerable import tiny_model
from tiltlm.errors import NumericalError, UnreachableTargetError, UsageError
from tiltlm.exact import enumerate_completions, exact_kl, exact_target
from tiltlm.features import Feature, build_feature, callable_feature, length, measure
from tiltlm.lm import LanguageModel, Prompts, Samples, SamplingSettings
from tiltlm.targets import (
    BaseSample,
    FittedTarget,
    Target,
    TiltedTarget,
    constrain,
    fit_target,
    report_fit,
    target_terms,
)

LENGTH = 4

A: Feature = build_feature({"contains": "a"})
B: Feature = build_feature({"contains": "b"})
WORDS: Feature = length("words")


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    return tiny_model("gpt2", "pad_is_eos")


@pytest.fixture(scope="module")
def everything(base: LanguageModel) -> Samples:
    """All completions of the base, with their exact log-probabilities."""
    return enumerate_completions(base, max_completion_length=LENGTH)


def share(everything: Samples, feature: Feature) -> float:
    return float(everything.sequence_logprob.exp() @ feature(everything.texts))


def drawn(everything: Samples, n: int, seed: int, values: Tensor) -> BaseSample:
    """``n`` samples of the base, drawn from the list of all its completions with their feature values [all, K]."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.multinomial(everything.sequence_logprob.exp(), n, replacement=True, generator=generator)
    return BaseSample(everything.select(rows), values[rows], LENGTH)


def written(values: Tensor) -> BaseSample:
    """A base sample of empty texts with these feature values [N, K]."""
    n = len(values)
    zeros = torch.zeros(n, 1)
    prompts = Prompts(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1, dtype=torch.bool), (None,))
    samples = Samples(zeros.long(), zeros.bool(), zeros.double(), zeros[:, 0].long(), prompts, SamplingSettings(), None)
    return BaseSample(samples, values.double(), LENGTH)


@pytest.fixture(scope="module")
def fitted(base: LanguageModel) -> FittedTarget:
    """A filter, a moment and a reward together."""
    return constrain(
        base,
        {B: 1.0, A: 0.5},
        reward=WORDS.renamed("words"),
        beta=2.0,
        samples=4000,
        max_completion_length=LENGTH,
        seed=3,
    )


def test_a_hybrid_target_has_its_moments_under_the_exact_base(
    base: LanguageModel, everything: Samples, fitted: FittedTarget
) -> None:
    truth = exact_target(base, fitted, everything)
    assert float(truth.moments[0]) == pytest.approx(1.0, abs=1e-12)
    achieved = fitted.report.terms[1].achieved
    assert achieved.value == pytest.approx(0.5, abs=1e-9)
    assert float(truth.moments[1]) == pytest.approx(0.5, abs=5 * achieved.se)
    assert achieved.se < 0.05


def test_kinds_goals_and_coefficients_are_as_given(fitted: FittedTarget) -> None:
    assert [term.kind for term in fitted.terms] == ["filter", "moment", "reward"]
    assert [term.goal for term in fitted.terms] == [1.0, 0.5, None]
    assert fitted.terms[2].coefficient == 0.5
    assert fitted.report.terms[0].coefficient is None
    assert fitted.report.terms[2].coefficient is not None
    assert fitted.report.terms[2].coefficient.se == 0.0
    fit = fitted.report.terms[1].coefficient
    assert fit is not None
    assert fit.value == fitted.terms[1].coefficient
    assert 0 < fit.se < 1


def test_the_base_sample_is_kept_with_its_length_and_values(base: LanguageModel, fitted: FittedTarget) -> None:
    kept = fitted.base_sample
    assert kept.max_completion_length == LENGTH
    assert len(kept.samples) == fitted.report.samples == 4000
    again = base.sample(4000, seed=3, max_completion_length=LENGTH)
    assert torch.equal(kept.samples.tokens, again.tokens)
    assert torch.equal(kept.features, measure([B, A, WORDS], again.texts))


@pytest.mark.parametrize("kind", ["moments", "filter", "reward"])
def test_the_reports_errors_cover_the_truth_of_the_fitted_target(
    base: LanguageModel, everything: Samples, kind: str
) -> None:
    """Over many small samples, z = (estimate − truth)/se must have mean 0 and standard deviation 1."""
    stated = {
        "moments": target_terms([(A, 0.6), (WORDS, 2.5)]),
        "filter": target_terms([(B, 1.0), (A, 0.6)]),
        "reward": target_terms([(A, 0.6)], reward=WORDS, beta=1.5),
    }[kind]
    features = [term.feature for term in stated]
    base_logprob, values = everything.sequence_logprob, measure(features, everything.texts)
    z: dict[str, list[float]] = {"log_z": [], "kl": [], "moment": []}
    for seed in range(200):
        target = fit_target(stated, drawn(everything, 800, seed, values))
        score = target.log_score(base_logprob, values)
        log_z = float(score.logsumexp(0))
        kl = exact_kl(score - log_z, base_logprob)
        moment = float((score - log_z).exp() @ values[:, -1])
        report = target.report
        for name, estimate, truth in (
            ("log_z", report.log_z, log_z),
            ("kl", report.kl_p_a, kl),
            ("moment", report.terms[-1].achieved, moment),
        ):
            z[name].append((estimate.value - truth) / estimate.se)
    for name, values_of_z in z.items():
        column = torch.tensor(values_of_z)
        assert abs(float(column.mean())) < 0.25, name
        assert 0.85 < float(column.std()) < 1.15, name


def test_ess_and_kl_agree_with_their_definitions(everything: Samples) -> None:
    sample = drawn(everything, 500, 0, measure([A], everything.texts))
    target = fit_target(target_terms([(A, 0.7)]), sample)
    weights = target.log_tilt(sample.features).softmax(0)
    assert target.report.ess.value == pytest.approx(1 / float(weights.square().sum()))
    assert target.report.kl_p_a.value == pytest.approx(float((weights * (weights * 500).log()).sum()))


def test_a_filter_alone_is_the_share_of_its_hits(everything: Samples) -> None:
    sample = drawn(everything, 500, 1, measure([B], everything.texts))
    report = fit_target(target_terms([(B, 1.0)]), sample).report
    rate = float(sample.features.mean())
    assert report.log_z.value == pytest.approx(math.log(rate))
    assert report.log_z.se == pytest.approx(math.sqrt((1 - rate) / (rate * 500)))
    assert report.kl_p_a.value == pytest.approx(-math.log(rate))
    assert report.ess.value == pytest.approx(rate * 500)
    assert report.terms[0].base.value == pytest.approx(rate)
    assert report.terms[0].achieved.value == pytest.approx(1.0)


def test_few_effective_samples_give_a_warning_with_a_number_of_samples(everything: Samples) -> None:
    many = fit_target(target_terms([(A, 0.5)]), drawn(everything, 2000, 0, measure([A], everything.texts))).report
    few = fit_target(target_terms([(A, 0.5)]), drawn(everything, 60, 0, measure([A], everything.texts))).report
    assert many.warnings == ()
    assert len(few.warnings) == 1
    wanted = math.ceil(60 * 100 / few.ess.value)
    assert f"{few.ess.value:.0f} of 60" in few.warnings[0]
    assert f"{wanted:,} samples" in few.warnings[0]


def test_the_report_is_the_target_section_of_run_json(fitted: FittedTarget) -> None:
    record = json.loads(json.dumps(fitted.report.to_json(), allow_nan=False))
    assert set(record) == {"features", "log_z", "ess", "kl_p_a", "samples", "warnings"}
    by_name = {entry["name"]: entry for entry in record["features"]}
    assert list(by_name) == [B.name, A.name, "words"]
    assert [entry["kind"] for entry in record["features"]] == ["filter", "moment", "reward"]
    assert by_name[B.name]["coefficient"] is None
    assert by_name["words"]["goal"] is None
    assert by_name["words"]["coefficient"] == {"value": 0.5, "se": 0.0}
    for estimate in (record["log_z"], record["ess"], record["kl_p_a"], by_name[A.name]["base"]):
        assert set(estimate) == {"value", "se"}
        assert math.isfinite(estimate["value"])
        assert estimate["se"] > 0
    assert record["samples"] == 4000


def test_short_forms_mappings_and_pairs_give_the_same_target(base: LanguageModel, everything: Samples) -> None:
    arguments = {"samples": 300, "max_completion_length": LENGTH, "seed": 1}
    one = constrain(base, {"contains:a": 0.5}, **arguments)
    two = constrain(base, [("contains:a", 0.5)], **arguments)
    assert isinstance(two, FittedTarget)
    assert one.terms[0].coefficient == two.terms[0].coefficient
    assert one.terms[0].feature == two.terms[0].feature == build_feature({"contains": "a"})


def test_moment_one_of_a_number_is_a_moment_not_a_filter() -> None:
    (term,) = target_terms([(WORDS, 1.0)])
    assert term.kind == "moment"
    (term,) = target_terms([(WORDS, 0.0)])
    assert term.kind == "moment"


@pytest.mark.parametrize(
    ("constraints", "settings", "parts"),
    [
        ([(A, 1.5)], {}, [A.name, "1.5", "[0, 1]"]),
        ([(A, -0.1)], {}, [A.name, "-0.1", "[0, 1]"]),
        ([(A, 0)], {}, [A.name, "opposite", "1.0"]),
        ([(A, math.nan)], {}, [A.name, "nan", "finite"]),
        ([(WORDS, math.inf)], {}, [WORDS.name, "inf", "finite"]),
        ([(A, "half")], {}, [A.name, "'half'", "finite number"]),
        ([(A, True)], {}, [A.name, "True"]),
        ([(A, 0.5), (A, 0.6)], {}, [A.name, "another name"]),
        ([], {}, ["at least one constraint", "reward"]),
        ([], {"reward": WORDS, "beta": 0.0}, ["beta", "0.0", "above 0"]),
        ([], {"reward": WORDS, "beta": -1.0}, ["beta", "-1.0", "above 0"]),
        ([], {"reward": WORDS, "beta": math.inf}, ["beta", "inf"]),
        ([("contians:a", 0.5)], {}, ["contians", "contains"]),
    ],
)
def test_wrong_constraints_are_a_usage_error(
    constraints: list[tuple[Feature | str, float]], settings: dict[str, float], parts: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        target_terms(constraints, **settings)
    for part in parts:
        assert part in str(caught.value)


def binary(name: str) -> Feature:
    return callable_feature(lambda texts: [0.0] * len(texts), name=name, binary=True)


@pytest.mark.parametrize(
    ("moments", "values", "parts"),
    [
        ([1.0], [[0.0]] * 60, ["'x'", "never held in 60 samples", "0.05", "600 samples", "target.samples", "looser"]),
        ([1.0], [[1.0]] * 60, ["'x'", "held in all 60", "Remove it"]),
        ([1.0, 1.0], [[0.0, 1.0], [1.0, 0.0]] * 30, ["'x'", "'y'", "never held together", "60", "target.samples"]),
        # Within the filter y is always there.
        ([1.0, 0.5], [[1.0, 1.0], [0.0, 0.0]] * 30, ["'y'", "1 in all 30", "leave it out"]),
    ],
)
def test_unreachable_moments_are_refused(moments: list[float], values: list[list[float]], parts: list[str]) -> None:
    terms = target_terms(list(zip([binary("x"), binary("y")], moments, strict=False)))
    with pytest.raises(UnreachableTargetError) as caught:
        fit_target(terms, written(torch.tensor(values)))
    for part in parts:
        assert part in str(caught.value)


def test_log_score_is_minus_infinity_outside_of_the_support_and_never_nan() -> None:
    terms = target_terms([(binary("x"), 1.0), (binary("y"), 0.3)], reward=WORDS, beta=0.01)
    target = TiltedTarget(tuple(terms))
    values = torch.tensor(
        [[x, y, r] for x in (0.0, 1.0) for y in (0.0, 1.0) for r in (-1e300, -3.0, 0.0, 5.0, 1e300)],
        dtype=torch.float64,
    )
    for base_logprob in (-1e308, -700.0, 0.0, -math.inf):
        score = target.log_score(torch.full((len(values),), base_logprob, dtype=torch.float64), values)
        assert score.dtype == torch.float64
        assert not bool(score.isnan().any())
        assert bool((score[values[:, 0] == 0] == -math.inf).all())
    usual = target.log_score(torch.full((len(values),), -700.0), values)
    inside = (values[:, 0] == 1) & (values[:, 2].abs() < 10)
    assert usual[inside].tolist() == pytest.approx((-700 + 100 * values[inside, 2]).tolist())


def test_a_tilt_never_depends_on_the_base_beyond_its_logarithm(fitted: FittedTarget) -> None:
    values = fitted.base_sample.features[:50]
    logprob = -torch.linspace(0, 400, 50, dtype=torch.float64)
    difference = fitted.log_score(logprob, values) - fitted.log_score(torch.zeros(50), values)
    inside = values[:, 0] == 1
    assert difference[inside].tolist() == pytest.approx(logprob[inside].tolist())


class Mine:
    """A user's own target, which may be anything with features and a log-score."""

    features = (WORDS,)

    def __init__(self, strength: float) -> None:
        self.strength = strength

    def log_score(self, base_logprob: Tensor, features: Tensor) -> Tensor:
        return base_logprob + self.strength * features[:, 0].square()


def test_a_users_own_target_is_reported_like_ours(everything: Samples) -> None:
    sample = drawn(everything, 600, 2, measure([WORDS], everything.texts))
    mine = Mine(-0.3)
    assert isinstance(mine, Target)
    report = report_fit(mine, sample)
    weights = (-0.3 * sample.features[:, 0].square()).softmax(0)
    assert report.terms[0].achieved.value == pytest.approx(float(weights @ sample.features[:, 0]))
    assert report.terms[0].coefficient is None
    assert report.terms[0].name == WORDS.name


@pytest.mark.parametrize(("strength", "error"), [(math.nan, NumericalError), (math.inf, NumericalError)])
def test_a_users_target_with_a_log_score_that_is_no_number_is_refused(
    everything: Samples, strength: float, error: type[Exception]
) -> None:
    with pytest.raises(error, match="log_score gave"):
        report_fit(Mine(strength), drawn(everything, 50, 2, measure([WORDS], everything.texts)))


def test_a_users_target_without_a_sample_in_its_support_is_refused(everything: Samples) -> None:
    some = everything.select(measure([WORDS], everything.texts)[:, 0] > 0)
    sample = BaseSample(some, measure([WORDS], some.texts), LENGTH)
    with pytest.raises(UnreachableTargetError, match="none of"):
        report_fit(Mine(-math.inf), sample)
