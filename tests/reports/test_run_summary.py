"""The summary of a run's record, and texts cut at their evidence."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiltlm.reports.samples_view import pair_samples, segments_of
from tiltlm.reports.summary import Measured, is_met, summarize


def estimate(value: float | None, se: float | None = 0.01) -> dict[str, float | None]:
    return {"value": value, "se": se}


def record_of(*features: tuple[str, str, float | None, float]) -> dict[str, Any]:
    """A run's record from (name, kind, goal, mean under the tuned model)."""
    return {
        "status": "done",
        "target": {
            "features": [
                {"name": name, "kind": kind, "goal": goal, "base": estimate(0.1), "achieved": estimate(0.5)}
                for name, kind, goal, _ in features
            ],
            "kl_p_a": estimate(0.2),
        },
        "evaluation": {"policy": {"samples": 1000, "moments": {name: estimate(mean) for name, _, _, mean in features}}},
    }


@pytest.mark.parametrize(
    ("value", "se", "met"),
    [
        (0.265, 0.001, True),
        (0.205, 0.001, True),
        (0.267, 0.001, False),
        (0.203, 0.001, False),
        (0.295, 0.031, True),
        (0.295, 0.029, False),
        (0.295, None, False),
        (None, 0.01, None),
    ],
)
def test_met_is_within_three_hundredths_or_two_standard_errors(value: Any, se: Any, met: bool | None) -> None:
    assert is_met(Measured.read(estimate(value, se)), 0.235) is met


@pytest.mark.parametrize(
    ("value", "se", "text"),
    [
        (0.2347, 0.0094, "0.235 ± 0.009"),
        (0.2347, 0.0123, "0.235 ± 0.012"),
        (-0.0512, 0.031, "−0.05 ± 0.03"),
        (1893.4, 14.2, "1,893 ± 14"),
        (0.99, 0.0996, "0.99 ± 0.10"),
        (0.25, None, "0.25"),
        (0.25, 0.0, "0.25"),
        (1e-5, 3.2e-6, "0.000010 ± 0.000003"),
        (1.234e-7, 1e-9, "1.23e−07 ± 1.00e−09"),
        (None, None, "–"),
    ],
)
def test_an_estimate_shows_as_many_decimals_as_its_error_supports(value: Any, se: Any, text: str) -> None:
    assert str(Measured.read(estimate(value, se))) == text


def test_verdict_counts_moments_and_filters_but_no_rewards() -> None:
    both = summarize(record_of(("female", "moment", 0.5, 0.49), ("calm", "reward", None, 0.1)), [])
    assert both.verdict == "The goal is met."
    assert [feature.met for feature in both.features] == [True, None]
    half = summarize(record_of(("female", "moment", 0.5, 0.3), ("sports", "filter", None, 0.99)), [])
    assert half.verdict == "1 of 2 goals are met."
    assert half.features[1].goal == 1.0
    assert summarize(record_of(("female", "moment", 0.5, 0.3)), []).verdict == "The goal is not met."
    assert summarize(record_of(("calm", "reward", None, 0.3)), []).verdict == "No goals: the target is a reward tilt."


@pytest.mark.parametrize(
    ("means", "verdict"),
    [
        ((0.5, 0.5), "Both goals are met."),
        ((0.3, 0.3), "Neither goal is met."),
        ((0.5, 0.5, 0.5), "All 3 goals are met."),
        ((0.3, 0.3, 0.3), "None of 3 goals is met."),
        ((0.5, 0.3, 0.5), "2 of 3 goals are met."),
    ],
)
def test_the_verdict_is_a_sentence(means: tuple[float, ...], verdict: str) -> None:
    features = [(f"feature {i}", "moment", 0.5, mean) for i, mean in enumerate(means)]
    assert summarize(record_of(*features), []).verdict == verdict


@pytest.mark.parametrize(
    ("base", "value", "se", "met"),
    [
        # A goal of 0.02 is within 0.03 of a base whose mean is 0.
        (0.001, 0.002, 0.001, False),
        (0.001, 0.018, 0.001, True),
        (0.001, 0.018, 0.004, True),
        # A moment whose goal is the base's value has not changed.
        (0.021, 0.022, 0.001, True),
        (None, 0.002, 0.001, True),
    ],
)
def test_a_goal_close_to_the_base_is_met_only_by_coming_closer(base: Any, value: float, se: float, met: bool) -> None:
    assert is_met(Measured(value, se), 0.02, Measured.read(base)) is met


def test_the_distance_to_the_goal_has_a_sign() -> None:
    features = summarize(
        record_of(("a", "moment", 0.5, 0.48), ("b", "moment", 0.5, 0.53), ("r", "reward", None, 1)), []
    )
    assert [feature.off_text for feature in features.features] == ["−0.020", "+0.030", ""]


def test_the_target_in_words_names_filters_moments_and_rewards() -> None:
    record = record_of(
        ("sports", "filter", None, 1.0),
        ("a", "moment", 0.5, 0.5),
        ("b", "moment", 0.25, 0.3),
        ("calm", "reward", None, 0),
    )
    assert summarize(record, []).target == (
        "Target: only texts with “sports”; a mean of 0.5 for “a” and 0.25 for “b”; a tilt by the reward “calm”; "
        "otherwise as close to the base model as possible."
    )


def test_without_evaluation_figures_are_those_of_the_last_step_and_no_goal_is_judged() -> None:
    record = record_of(("female", "moment", 0.5, 0.5))
    del record["evaluation"]
    summary = summarize(
        record, [{"step": 1}, {"step": 2, "moments": {"female": estimate(0.4)}, "kl_p_pi": estimate(0.1)}]
    )
    assert (summary.verdict, summary.source) == ("Not evaluated yet.", "training step 2")
    assert (summary.features[0].tuned.value, summary.features[0].met) == (0.4, None)
    assert summary.kl_p_pi.value == 0.1


def test_an_empty_record_is_no_error() -> None:
    summary = summarize({"status": "failed"}, [])
    assert summary.verdict == "The run failed before it was evaluated."
    assert not summary.features
    assert math.isnan(summary.start.value)


SPANS = st.lists(st.tuples(st.integers(-3, 30), st.integers(-3, 30), st.sampled_from(["a", "b", "c"])), max_size=8)


@given(text=st.text(max_size=25), spans=SPANS)
def test_segments_join_to_the_text_and_name_the_features_of_each_character(
    text: str, spans: list[tuple[int, int, str]]
) -> None:
    evidence = [{"feature": feature, "start": start, "end": end} for start, end, feature in spans]
    segments = segments_of(text, evidence)
    assert "".join(segment.text for segment in segments) == text
    covering = [set(segment.features) for segment in segments for _ in segment.text]
    for position, names in enumerate(covering):
        assert names == {feature for start, end, feature in spans if start <= position < end}


def test_samples_pair_up_in_order_until_the_shorter_side_ends() -> None:
    records = [{"model": model, "text": f"{model} {i}"} for model, n in (("policy", 5), ("base", 2)) for i in range(n)]
    pairs = pair_samples(records, most=3)
    assert [pair.policy.segments[0].text for pair in pairs if pair.policy] == ["policy 0", "policy 1", "policy 2"]
    assert [pair.base is None for pair in pairs] == [False, False, True]
