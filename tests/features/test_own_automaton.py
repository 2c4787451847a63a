"""The code of docs/features.md that declares a kind with its own automaton: its record, token states and guide."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from enumerable import tiny_model
from tiltlm.errors import UsageError
from tiltlm.features import Automaton, Feature, build_feature, feature_kind, run_file_form
from tiltlm.features.kinds import FEATURE_KINDS, RESERVED
from tiltlm.guides import guide_toward
from tiltlm.guides.token_states import build_token_states
from tiltlm.targets import Term, TiltedTarget, draw_base_sample

PAGE = (Path(__file__).parents[2] / "docs" / "features.md").read_text(encoding="utf-8")
SECTION = PAGE[PAGE.index("## Your own kind") :]
(CODE,) = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The page's code, as the module ``my_rewards`` of the current directory."""
    (tmp_path / "my_rewards.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    monkeypatch.delitem(FEATURE_KINDS, "exclaims", raising=False)
    import my_rewards  # type: ignore[import-not-found]

    return my_rewards


def letter_of(base: Any) -> str:
    """A letter that is a token of the tiny model."""
    words = base.tokenizer.convert_ids_to_tokens(range(base.vocab_size))
    return next(word for word in words if word.isalpha() and len(word) == 1)


def test_the_kind_is_registered_as_the_built_in_ones_are(page: Any) -> None:
    assert build_feature("exclaims:2") == build_feature({"exclaims": {"least": 2}}) == page.exclaims(2)
    assert page.exclaims(2)(["Hi!", "No! No!"]).tolist() == [0.0, 1.0]
    with pytest.raises(UsageError, match="exclaims: unknown option 'most'"):
        build_feature({"exclaims": 2, "most": 3})


def test_the_record_of_the_kind_loads_in_a_process_that_has_not_imported_it(page: Any) -> None:
    features = [
        page.exclaims(3),
        build_feature("exclaims:2"),
        page.exclaims(1, mark="?").renamed("asks"),
        page.exclaims() & build_feature("contains:no"),
    ]
    forms = [run_file_form(feature) for feature in features]
    assert forms[0] == {"python": "my_rewards:exclaims", "args": {"least": 3}}
    assert [build_feature(form) for form in forms if form] == features
    code = "import json, sys; from tiltlm.features import build_feature as b; [b(f) for f in json.loads(sys.argv[1])]"
    subprocess.run([sys.executable, "-c", code, json.dumps(forms)], check=True, timeout=120)


def test_a_kind_that_no_other_process_can_import_has_no_record(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    feature = page.exclaims(2)
    monkeypatch.setattr(page, "exclaims", len)
    assert run_file_form(feature) is None
    monkeypatch.delattr(page, "exclaims")
    assert run_file_form(feature) is None


@pytest.mark.parametrize("name", ["contains", *RESERVED])
def test_a_name_that_is_taken_is_refused(page: Any, name: str) -> None:
    before = dict(FEATURE_KINDS)
    with pytest.raises(UsageError, match=f"'{name}' exists already"):
        feature_kind(name)(page.exclaims)
    with pytest.raises(UsageError, match="'exclaims' exists already"):
        feature_kind("exclaims")(test_a_name_that_is_taken_is_refused)  # type: ignore[arg-type]
    assert before == FEATURE_KINDS


def test_a_name_that_is_no_word_and_a_function_without_parameters_are_refused() -> None:
    def make() -> Feature:
        raise AssertionError

    with pytest.raises(UsageError, match="got 'two words'"):
        feature_kind("two words")
    with pytest.raises(UsageError, match="has no parameter"):
        feature_kind("no_parameter")(make)
    assert "no_parameter" not in FEATURE_KINDS


def test_a_notebook_cell_may_define_its_kind_again(page: Any) -> None:
    before = FEATURE_KINDS["exclaims"]
    exec(compile(CODE, "my_rewards.py", "exec"), page.__dict__)
    assert FEATURE_KINDS["exclaims"] is page.exclaims is not before


def test_the_table_lists_the_members_of_an_automaton_that_may_be_defined(page: Any) -> None:
    rows = re.findall(r"^\| `(\w+)(?:\(.*?\))?` \| (.*?) \|", SECTION, flags=re.MULTILINE)
    required = {name for name, default in rows if default == "required"}
    assert required == Automaton.__abstractmethods__
    assert {name for name, _ in rows} - required == {"add", "forget"}
    automaton = page.exclaims(2).automaton()
    state = automaton.start
    for character in "a!b!!":
        state = automaton.step(state, character)
    assert state == (2, "anywhere")
    assert (automaton.coarse(state), automaton.final_count(state)) == (state, 2)


def test_its_token_states_hold_the_value_of_each_sampled_text(page: Any) -> None:
    base = tiny_model("gpt2", "pad_is_eos")
    feature = page.exclaims(2, mark=letter_of(base))
    sample = draw_base_sample(base, [feature], 500, None, 4, seed=0)
    states = build_token_states(base, [feature], sample.samples)
    assert states.values is not None
    values = []
    for ids in sample.samples.completion_ids:
        state = states.start
        for token in ids:
            state = int(states.transitions[state][token]) % len(states.transitions)
        values.append(float(states.values[state, 0]))
    assert values == feature(sample.samples.texts).tolist()
    assert set(values) == {0.0, 1.0}


def test_a_guide_made_of_it_draws_what_the_target_asks(page: Any) -> None:
    base = tiny_model("gpt2", "pad_is_eos")
    feature = page.exclaims(2, mark=letter_of(base))
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
