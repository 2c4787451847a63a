"""Prompts with columns from files, lists and data sets, as the model and the features get them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from enumerable import tiny_model
from tiltlm.app.prompts import encode_prompts, read_prompts
from tiltlm.config.prompt_data import PromptData, parse_prompts, prompt_rows
from tiltlm.config.run import parse_config
from tiltlm.config.yaml_file import apply_override
from tiltlm.errors import UsageError
from tiltlm.features import callable_feature, measure
from tiltlm.lm import LanguageModel
from tiltlm.lm.memory import Memory
from tiltlm.targets import draw_base_sample, measure_samples
from tiltlm.training.checkpoint import load_base_sample, save_base_sample

ROWS = [
    {"prompt": "a b", "word": "b", "weight": 2},
    {"prompt": "d", "word": "ä, “c”", "weight": -1},
    {"prompt": "b a b a", "word": "", "weight": 0},
]
CHAT = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}]
TEMPLATE = (
    "{% for m in messages %}{{ 'd ' if m.role == 'user' else 'c ' }}{{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}c{% endif %}"
)


def training_prompts(**prompts: Any) -> PromptData:
    """The training prompts of a config with this ``prompts`` section."""
    target = {"constraints": [{"feature": {"contains": "a"}, "moment": 0.5}]}
    found = read_prompts(parse_config({"model": "embedded", "target": target, "prompts": prompts})).training
    assert found is not None
    return found


def chat_model() -> LanguageModel:
    """A tiny model whose chat template writes d before a user's message and c before the model's."""
    tokenizer = copy.deepcopy(tiny_model().tokenizer)
    tokenizer.chat_template = TEMPLATE
    return LanguageModel(tiny_model().model, tokenizer)


def written(folder: Path, ending: str) -> Path:
    """A file of this kind with the rows."""
    path = folder / f"rows{ending}"
    if ending == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n", encoding="utf-8")
    elif ending == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif ending == ".csv":
        lines = ["prompt,word,weight", "a b,b,2", 'd,"ä, “c”",-1', "b a b a,,0"]
        path.write_text("\n".join(lines), encoding="utf-8-sig")
    else:
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    return path


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_each_kind_of_file_gives_the_prompts_and_the_columns(tmp_path: Path, ending: str) -> None:
    found = parse_prompts(str(written(tmp_path, ending)))
    assert found.prompts == tuple(row["prompt"] for row in ROWS)
    assert found.columns["word"] == tuple(row["word"] for row in ROWS)
    weights = tuple(str(row["weight"]) if ending == ".csv" else row["weight"] for row in ROWS)
    assert found.columns == {"word": found.columns["word"], "weight": weights}
    swapped = training_prompts(path=str(tmp_path / f"rows{ending}"), column="word", samples=2)
    assert swapped.prompts == ("b", "ä, “c”")
    assert swapped.columns["prompt"] == ("a b", "d")


def test_a_data_set_in_a_folder_is_read_by_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "rows_of_ours"
    folder.mkdir()
    written(folder, ".parquet").rename(folder / "test.parquet")
    found = training_prompts(dataset=str(folder), split="test")
    assert found.prompts == tuple(row["prompt"] for row in ROWS)
    assert found.columns["weight"] == (2, -1, 0)
    with pytest.raises(UsageError, match=r"^prompts.dataset: '.*rows_of_ours', split 'train' cannot be loaded: \w+"):
        training_prompts(dataset=str(folder))
    with pytest.raises(UsageError, match=r"^prompts.dataset: 'us/not-there', subset 'all', split 'train' cannot"):
        training_prompts(dataset="us/not-there", subset="all")


def test_a_text_file_has_one_prompt_per_line_and_a_string_is_one_prompt(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("a b\n\n  \nd\n")
    (tmp_path / "no ending").write_text("d")
    assert parse_prompts(str(tmp_path / "lines.txt")) == PromptData(("a b", "d"), {})
    assert parse_prompts(str(tmp_path / "no ending")).prompts == ("d",)
    assert parse_prompts("once upon a time").prompts == ("once upon a time",)
    assert parse_prompts(["a", "b"]).prompts == ("a", "b")


def test_rows_may_lack_a_column_and_values_that_are_not_plain_are_dropped() -> None:
    rows = [{"prompt": "a", "x": 1, "image": b"\0", "prompts": 3}, {"prompt": "b", "image": None}, "c"]
    found = prompt_rows(rows, "prompt", "the list")
    assert found.prompts == ("a", "b", "c")
    assert found.columns == {"x": (1, None, None)}
    assert found.select([2, 0]) == PromptData(("c", "a"), {"x": (None, 1)})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2 of .*a.jsonl is not valid JSON"),
        ("a.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "row 2 of the file .* has no column 'prompt'; .*valid: text"),
        ("a.jsonl", '{"prompt": "a"}\n\n{"prompt": null}\n', "row 2 of the file .* is None; expected text, or a list"),
        ("a.jsonl", "[]\n", r"row 1 of the file .* is \[\]; expected text"),
        ("a.jsonl", '[{"role": "user"}]\n', "row 1 of the file .*: a message has content None"),
        ("a.json", '{"prompt": "a"}', "a.json is not a list"),
        ("a.json", "[1", "a.json is not valid JSON"),
        ("a.csv", "prompt,word\na,b\nc,d,e\n", "line 3 of .*a.csv has more or fewer fields"),
        ("a.csv", "prompt,word\na\n", "line 2 of .*a.csv has more or fewer fields"),
        ("a.csv", 'prompt,word\na,"b\n', "a.csv is not valid CSV"),
        ("a.csv", "prompt,word\n", "the file .*a.csv has no prompts"),
        ("a.parquet", "no such thing", "a.parquet cannot be read as Parquet"),
        ("a.txt", "\n", "the file .*a.txt has no prompts"),
    ],
)
def test_an_error_in_a_file_names_its_place(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=f"^prompts: .*{said}"):
        parse_prompts(str(tmp_path / name))


@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".json", ".csv", ".parquet"])
def test_a_file_that_is_not_there_or_no_text(tmp_path: Path, ending: str) -> None:
    with pytest.raises(UsageError, match="No such file"):
        parse_prompts(str(tmp_path / f"none{ending}"))
    (tmp_path / f"bytes{ending}").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UsageError, match=r"UTF-8|Parquet"):
        parse_prompts(str(tmp_path / f"bytes{ending}"))


def test_a_share_is_held_out_by_the_seed_and_nothing_is_in_both() -> None:
    data = PromptData(tuple(f"prompt {i}" for i in range(20)), {"n": tuple(range(20))})
    kept, held = data.split(0.25, seed=3)
    assert (len(kept), len(held)) == (15, 5)
    assert sorted([*kept.columns["n"], *held.columns["n"]]) == list(range(20))
    assert held.columns["n"] == tuple(sorted(held.columns["n"]))
    assert all(prompt == f"prompt {n}" for prompt, n in zip(held.prompts, held.columns["n"], strict=True))
    assert data.split(0.25, seed=3) == (kept, held)
    assert data.split(0.25, seed=4)[1] != held


def test_an_override_reaches_into_the_mapping_of_prompts() -> None:
    raw: dict[str, Any] = {"prompts": "rows.jsonl"}
    apply_override(raw, "prompts.samples=3")
    assert raw == {"prompts": {"path": "rows.jsonl", "samples": 3}}


def test_chat_messages_are_encoded_by_the_template_up_to_where_the_answer_begins() -> None:
    model = chat_model()
    words = model.tokenizer.get_vocab()
    prompts = model.encode_prompts(["a", CHAT, CHAT[:2]])
    tokens = [row[kept].tolist() for row, kept in zip(prompts.tokens, prompts.mask, strict=True)]
    assert tokens == [[words[word] for word in text.split()] for text in ("a", "d a b c c d d c", "d a b c c")]
    assert prompts.texts == ("a", "a b\nc\nd", "a b\nc")
    assert prompts.messages == (None, CHAT, CHAT[:2])
    assert model.encode_prompts(CHAT).messages == (CHAT,), "a list of messages is one prompt"
    assert model.encode_prompts(["a", "b"]).messages is None
    samples = model.sample(4, CHAT, seed=0, max_completion_length=3)
    assert samples.prompt_texts == ["a b\nc\nd"] * 4


def test_chat_messages_need_a_template_that_takes_them() -> None:
    with pytest.raises(
        UsageError, match=r"prompt 2 is chat messages, but the tokenizer of 'gpt2.*' has no chat template"
    ):
        tiny_model().encode_prompts(["a", CHAT])
    strict = chat_model()
    strict.tokenizer.chat_template = "{{ raise_exception('the user speaks first') }}"
    with pytest.raises(UsageError, match=r"refuses prompt 1: TemplateError: the user speaks first"):
        strict.encode_prompts(CHAT)
    for wrong in (3, ["a", 3], [[{"role": "user"}]], {"role": "user", "content": "a"}):
        with pytest.raises(UsageError, match=r"^prompts: .* is no text; give a string, chat messages, or a list"):
            tiny_model().encode_prompts(wrong)  # type: ignore[arg-type]


def test_columns_travel_with_their_prompts_to_the_features() -> None:
    model = tiny_model()
    data = parse_prompts(ROWS)
    seen: list[dict[str, Any]] = []

    def weighted(completions: list[str], word: list[str], **columns: Any) -> list[float]:
        seen.append(columns)
        return [float(w in text) for w, text in zip(word, completions, strict=True)]

    feature = callable_feature(weighted)
    drawn = draw_base_sample(model, [feature], 20, encode_prompts(model, data), 4, seed=3)
    samples = drawn.samples
    by_prompt = {row["prompt"]: row for row in ROWS}
    words = [by_prompt[str(text)]["word"] for text in samples.prompt_texts]
    assert samples.columns == {"word": words, "weight": [by_prompt[str(t)]["weight"] for t in samples.prompt_texts]}
    assert drawn.features[:, 0].tolist() == [float(w in t) for w, t in zip(words, samples.texts, strict=True)]
    assert [ROWS[i]["prompt"] for i in samples.prompt_ids.tolist()] == samples.prompt_texts
    few = samples.select(torch.tensor([7, 2]))
    assert measure_samples([feature], few)[:, 0].tolist() == [drawn.features[i, 0] for i in (7, 2)]
    with pytest.raises(UsageError, match=r"columns: 'word' has 1 values for 2 prompts"):
        model.encode_prompts(["a", "b"], {"word": ["c"]})


def test_functions_for_chats_get_the_messages_and_others_the_text() -> None:
    model, got = chat_model(), []

    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        got.append((prompts, completions[0], sorted(columns)))
        return [0.0] * len(prompts)

    samples = model.sample(3, model.encode_prompts([CHAT, "a"], {"topic": ["x", "y"]}), 0, max_completion_length=2)
    measure_samples([callable_feature(reward, conversational=True), callable_feature(reward)], samples)
    (chats, completion, names), (texts, text, _) = got
    assert chats == [CHAT, [{"role": "user", "content": "a"}], CHAT]
    assert completion == [{"role": "assistant", "content": text}]
    assert texts == ["a b\nc\nd", "a", "a b\nc\nd"]
    assert "topic" in names
    # As before where there is no chat.
    measure([callable_feature(reward, conversational=True)], ["t"], prompts=["p"])
    assert got[-1][0] == [[{"role": "user", "content": "p"}]]


def test_a_prompt_that_is_too_long_is_named_by_its_row() -> None:
    model = tiny_model()
    prompts = ["a", "b " * 22 + "d", "c"]
    for draw in (
        lambda: model.sample(2, prompts, 0, max_completion_length=4),
        lambda: draw_base_sample(model, [], 2, prompts, 4, seed=1),
        lambda: model.sample(2, model.encode_prompts(prompts).select([2, 1]), 0, max_completion_length=4),
    ):
        with pytest.raises(
            UsageError, match=r"4 tokens after prompt 2, 'b b .*', of 23 are more than the 24 positions"
        ):
            draw()
    assert len(model.sample(2, prompts, 0, max_completion_length=2)) == 2


def test_selected_prompts_carry_no_padding_that_none_of_them_needs() -> None:
    model = tiny_model()
    prompts = model.encode_prompts(["a", "b a b a", "d c"], {"n": [1, 2, 3]})
    few = prompts.select([2, 0])
    assert (few.texts, few.columns, few.ids) == (("d c", "a"), {"n": (3, 1)}, (2, 0))
    assert few.tokens.shape == (2, 2)
    assert few.select([1]).ids == (0,)
    one, other = (model.sample(2, p, 5, max_completion_length=3) for p in (few, ["d c", "a"]))
    torch.testing.assert_close(one.proposal_logprob, other.proposal_logprob)


def test_pieces_of_work_are_bounded_by_prompt_and_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    samples = model.sample(30, ["a b c d a b c d", "a"], 1, max_completion_length=5)
    monkeypatch.setattr(
        Memory,
        "bound",
        property(lambda memory: (model.memory.logits if model.output_layer is None else model.memory.activations) * 40),
    )
    for rows in model.chunks(samples):
        assert len(rows) * (int(samples.lengths[rows].max()) + 7) <= 40


def test_a_checkpoint_keeps_prompts_with_their_messages_and_columns(tmp_path: Path) -> None:
    model = chat_model()
    prompts = model.encode_prompts([CHAT, "a", "b"], {"extra": [{"x": [1, None]}, "é", 2.5]})
    kept = draw_base_sample(model, [], 7, prompts, 3, seed=0)
    save_base_sample(tmp_path, kept)
    again = load_base_sample(tmp_path, model)
    assert again is not None
    one, other = again.samples.prompts, kept.samples.prompts
    assert (one.texts, one.messages, one.columns, one.ids) == (other.texts, other.messages, other.columns, other.ids)
    assert torch.equal(one.tokens, other.tokens)
