"""Python functions as features: plain functions, TRL reward functions, and a third-party package."""

from __future__ import annotations

import asyncio
import functools
import sys
from pathlib import Path

import pytest
import torch

from tiltlm.errors import FeatureError, UsageError
from tiltlm.features import Feature, build_feature, callable_feature, feature, measure

PLUGIN = Path(__file__).parents[1] / "plugin" / "brevity_rewards"
TEXTS = ["one", "one two", "one two three"]
PROMPTS = ["a longer prompt than that", None, "p"]
IDS = [[1, 0], [1, 2, 0], [1, 2, 3, 0]]


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PLUGIN))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory that leaves no modules and no path behind."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    for module in ("my_rewards", "my_package", "my_package.rewards"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return tmp_path


# TRL's documented reward signatures, each unchanged.


def reward_with_everything(prompts, completions, completion_ids, **kwargs):  # type: ignore[no-untyped-def]
    return [
        float(len(prompt) + 100 * len(completion) + 10000 * len(ids))
        for prompt, completion, ids in zip(prompts, completions, completion_ids, strict=True)
    ]


def reward_of_completions(completions, **kwargs):  # type: ignore[no-untyped-def]
    return [float(len(completion)) for completion in completions]


def reward_of_ids(completion_ids, **kwargs):  # type: ignore[no-untyped-def]
    return [float(len(ids)) for ids in completion_ids]


def reward_with_column(completions, ground_truth, **kwargs):  # type: ignore[no-untyped-def]
    return [float(truth in completion) for completion, truth in zip(completions, ground_truth, strict=True)]


def reward_column_first(ground_truth, completions):  # type: ignore[no-untyped-def]
    return [float(truth in completion) for completion, truth in zip(completions, ground_truth, strict=True)]


def reward_of_prompts(prompts, **kwargs):  # type: ignore[no-untyped-def]
    return [float(len(prompt) + len(kwargs["completions"][0])) for prompt in prompts]


def reward_of_keywords(**kwargs):  # type: ignore[no-untyped-def]
    return [float(len(completion)) for completion in kwargs["completions"]]


def reward_that_logs(completions, log_extra=None, log_metric=None, **kwargs):  # type: ignore[no-untyped-def]
    log_extra("length", [len(completion) for completion in completions])
    log_metric("mean length", 1.0)
    return [float(len(completion)) for completion in completions]


async def reward_async(completions, **kwargs):  # type: ignore[no-untyped-def]
    await asyncio.sleep(0)
    return [float(len(completion)) for completion in completions]


class RewardObject:
    __name__ = "reward_object"

    def __call__(self, completions, **kwargs):  # type: ignore[no-untyped-def]
        return torch.tensor([float(len(completion)) for completion in completions])


def reward_of_messages(completions, **kwargs):  # type: ignore[no-untyped-def]
    return [float(len(completion[0]["content"])) for completion in completions]


LENGTHS = [3.0, 7.0, 13.0]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (reward_with_everything, [20325.0, 30700.0, 41301.0]),
        (reward_of_completions, LENGTHS),
        (reward_of_ids, [2.0, 3.0, 4.0]),
        (reward_with_column, [0.0, 1.0, 0.0]),
        (reward_column_first, [0.0, 1.0, 0.0]),
        (reward_of_prompts, [28.0, 3.0, 4.0]),
        (reward_of_keywords, LENGTHS),
        (reward_that_logs, LENGTHS),
        (reward_async, LENGTHS),
        (RewardObject(), LENGTHS),
        (functools.partial(reward_of_completions, scale=2), LENGTHS),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_trl_reward_functions_work_as_they_are(function: object, expected: list[float]) -> None:
    reward = callable_feature(function)  # type: ignore[arg-type]
    values = reward(TEXTS, prompts=PROMPTS, completion_ids=IDS, ground_truth=["x", "two", "zwei"])
    assert values.tolist() == expected
    assert values.dtype == torch.float64


def test_an_async_reward_works_inside_a_running_event_loop() -> None:
    async def notebook_cell() -> list[float]:
        values: list[float] = callable_feature(reward_async)(TEXTS).tolist()
        return values

    assert asyncio.run(notebook_cell()) == LENGTHS


def test_chat_messages_are_handed_over_when_asked_for() -> None:
    assert callable_feature(reward_of_messages, conversational=True)(TEXTS).tolist() == LENGTHS
    with pytest.raises(FeatureError, match="set conversational: true"):
        callable_feature(reward_of_messages)(TEXTS)


def test_prompts_that_are_not_there_are_empty() -> None:
    assert callable_feature(reward_of_prompts)(TEXTS).tolist() == [3.0, 3.0, 3.0]


@pytest.mark.parametrize(
    "function",
    [
        lambda texts: [len(text) for text in texts],
        lambda strings, /: [len(text) for text in strings],
        lambda *args: [len(text) for text in args[0]],
        lambda texts, prompts: [len(text) + 0 * len(prompt) for text, prompt in zip(texts, prompts, strict=True)],
        lambda texts, **kwargs: [len(text) + len(kwargs) for text in texts],
        lambda texts: torch.tensor([float(len(text)) for text in texts], dtype=torch.float16, requires_grad=True),
        lambda texts: (len(text) for text in texts),
        functools.partial(map, len),
    ],
)
def test_plain_functions_get_the_texts_first(function: object) -> None:
    assert callable_feature(function)(TEXTS, prompts=PROMPTS).tolist() == LENGTHS  # type: ignore[arg-type]


def test_the_decorator_makes_a_feature_that_composes() -> None:
    @feature
    def number_of_vowels(texts: list[str]) -> list[int]:
        return [sum(letter in "aeiou" for letter in text) for text in texts]

    @feature(name="has two", binary=True)
    def has_two(texts: list[str]) -> list[bool]:
        return ["two" in text for text in texts]

    assert (number_of_vowels.name, number_of_vowels.binary) == ("number_of_vowels", False)
    assert (has_two.name, has_two.binary) == ("has two", True)
    both = has_two & number_of_vowels.threshold(4)
    assert both.name == "has two and number_of_vowels >= 4"
    assert measure([number_of_vowels, has_two, both], TEXTS).tolist() == [[2, 0, 0], [3, 1, 0], [5, 1, 1]]


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("spec", "name", "expected"),
    [
        ("python:brevity_rewards:brevity_reward", "brevity_reward", [1, 0, 0]),
        ({"python": "brevity_rewards:mean_word_length"}, "mean_word_length", [3, 3, 11 / 3]),
        ({"python": "brevity_rewards:at_most", "args": {"words": 2}}, "at_most(words=2)", [1, 1, 0]),
        ({"python": "brevity_rewards:brevity", "args": {"words": 4}}, "brevity(words=4)", [0.75, 0.5, 0.25]),
        ({"python": "brevity_rewards:brevity"}, "brevity", [0.9, 0.8, 0.7]),
        ({"python": "brevity_rewards:brevity", "name": "brief"}, "brief", [0.9, 0.8, 0.7]),
        ({"not": {"python": "brevity_rewards:brevity_reward", "binary": True}}, "not brevity_reward", [0, 1, 1]),
        (
            {"threshold": {"feature": {"python": "brevity_rewards:mean_word_length"}, "at": 3.5}},
            "mean_word_length >= 3.5",
            [0, 0, 1],
        ),
    ],
)
def test_a_third_party_package_gives_features(spec: object, name: str, expected: list[float]) -> None:
    built = build_feature(spec)  # type: ignore[arg-type]
    assert built.name == name
    assert built(TEXTS, prompts=PROMPTS).tolist() == pytest.approx(expected)


def test_a_module_in_the_current_directory_is_found(here: Path) -> None:
    (here / "my_rewards.py").write_text("def brevity(texts, words):\n    return [words / len(t) for t in texts]\n")
    built = build_feature({"python": "my_rewards:brevity", "args": {"words": 3}})
    assert built(["one", "eleven"]).tolist() == [1.0, 0.5]


def test_args_win_over_a_column_of_that_name_and_never_make_a_factory_of_a_reward(here: Path) -> None:
    (here / "my_rewards.py").write_text(
        "def reward(completions=None, scale=1, **kwargs):\n    return [scale * len(c) for c in completions]\n"
    )
    built = build_feature({"python": "my_rewards:reward", "args": {"scale": 2}})
    assert built(TEXTS, scale=[5, 5, 5]).tolist() == [6, 14, 26]
    assert build_feature("python:my_rewards:reward")(TEXTS).tolist() == LENGTHS


def test_a_package_in_the_current_directory_is_found(here: Path) -> None:
    (here / "my_package").mkdir()
    (here / "my_package" / "__init__.py").write_text("")
    (here / "my_package" / "rewards.py").write_text(
        "class Rewards:\n    @staticmethod\n    def one(texts):\n        return [1] * len(texts)\n"
        "class Length:\n"
        "    def __init__(self, scale=1):\n        self.scale = scale\n"
        "    def __call__(self, completions, **kwargs):\n        return [self.scale * len(c) for c in completions]\n"
        "from tiltlm.features import contains\nwar = contains('war')\n"
    )
    assert build_feature("python:my_package.rewards:Rewards.one")(TEXTS).tolist() == [1, 1, 1]
    assert build_feature("python:my_package.rewards:Length")(TEXTS).tolist() == LENGTHS
    scaled = build_feature({"python": "my_package.rewards:Length", "args": {"scale": 2}})
    assert scaled(TEXTS).tolist() == [6, 14, 26]
    assert scaled.name == "Length(scale=2)"
    war = build_feature({"all": ["python:my_package.rewards:war", "pronouns:neither"]})
    assert war(["War.", "His war with him."]).tolist() == [1, 0]
    with pytest.raises(UsageError, match="is a feature already"):
        build_feature({"python": "my_package.rewards:war", "args": {"x": 1}})


def test_a_class_of_features_can_be_made_from_the_run_file(here: Path) -> None:
    (here / "my_rewards.py").write_text(
        "from tiltlm.features import Feature\n"
        "class Vowels(Feature):\n"
        "    def compute(self, batch):\n        return [sum(c in 'aeiou' for c in text) for text in batch.texts]\n"
        "    def evidence(self, text):\n        return [(i, i + 1) for i, c in enumerate(text) if c in 'aeiou']\n"
    )
    vowels = build_feature({"python": "my_rewards:Vowels", "args": {"name": "vowels", "binary": False}})
    assert isinstance(vowels, Feature)
    assert vowels.name == "vowels"
    assert vowels.threshold(3)(TEXTS).tolist() == [0, 1, 1]
    assert vowels.evidence("one") == [(0, 1), (2, 3)]
