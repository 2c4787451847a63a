"""The feature of docs/extending.md with an automaton of its own: registered, read off prefixes, and guided by it."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from enumerable import tiny_model
from tiltlm.errors import UsageError
from tiltlm.features import Automaton, build_feature, feature_kind, run_file_form
from tiltlm.features.kinds import FEATURE_KINDS
from tiltlm.guides import guide_toward
from tiltlm.targets import Term, TiltedTarget, draw_base_sample

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index("## A feature with an automaton") : PAGE.index("## A target")]
(CODE,) = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The names that the page's code defines, as the module ``my_features``."""
    module = types.ModuleType("my_features")
    monkeypatch.setitem(sys.modules, "my_features", module)
    exec(compile(CODE, "my_features.py", "exec"), module.__dict__)
    yield module.__dict__
    FEATURE_KINDS.pop("excited", None)


def test_the_kind_is_registered_and_recorded_in_its_short_form(page: dict[str, Any]) -> None:
    feature = build_feature("excited:2")
    assert feature == page["excited"](2)
    assert run_file_form(page["excited"](marks=3)) == {"excited": 3}
    assert feature(["Hi!", "No! No!"]).tolist() == [0.0, 1.0]
    with pytest.raises(UsageError, match="'contains' exists already"):
        feature_kind("contains")(page["excited"])


def test_the_table_lists_the_methods_of_an_automaton_that_may_be_defined(page: dict[str, Any]) -> None:
    rows = re.findall(r"^\| `(\w+)(?:\(.*?\))?` \| (.*?) \|", SECTION, flags=re.MULTILINE)
    required = {name for name, default in rows if default == "required"}
    assert required == Automaton.__abstractmethods__
    assert {name for name, _ in rows} - required == {"add", "forget"}
    counted = page["ExclamationMarks"](2)
    state = counted.start
    for character in "a!b!!":
        state = counted.step(state, character)
    assert state == (2, "anywhere")
    assert (counted.coarse(state), counted.final_count(state)) == (state, 2)


def test_a_guide_made_of_it_draws_what_the_target_asks(page: dict[str, Any]) -> None:
    base = tiny_model("gpt2", "pad_is_eos")
    words = base.tokenizer.convert_ids_to_tokens(range(base.vocab_size))
    letter = next(word for word in words if word.isalpha() and len(word) == 1)

    class Letters(page["ExclamationMarks"]):  # type: ignore[misc]
        def move(self, place: Any, character: str) -> Any:
            return place, 1 if character == letter else None

    class Often(page["Excited"]):  # type: ignore[misc]
        def compute(self, batch: Any) -> list[float]:
            return [float(text.count(letter) >= self.marks) for text in batch.texts]

        def automaton(self) -> Automaton:
            return Letters(self.marks)

    feature = Often(name="often", binary=True, marks=2)
    target = TiltedTarget((Term(feature, "filter", 1.0),))
    sample = draw_base_sample(base, [feature], 2000, None, 4, seed=0)
    guide = base.placed(guide_toward(base, target, sample))
    drawn = base.sample(500, seed=1, max_completion_length=4, guide=guide)
    with torch.no_grad():
        again = base.logprob(drawn).double().sum(-1)
    torch.testing.assert_close(again, drawn.sequence_logprob, atol=1e-9, rtol=0)
    plain, guided = float(sample.features.mean()), float(feature(drawn.texts).mean())
    assert plain < 0.5
    assert guided > 0.95
