"""Every command on a tiny model: its output, its files, and that a seed determines both."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from command_line import Command, files_under, metrics_of, without_times, write_config, write_stops
from tiltlm.runs.directory import RUN_FIELDS
from tiltlm.training.trainer import Trainer

FIGURES = ("kl_p_pi", "kl_pi_a", "tv_p_pi", "log_z", "ess", "entropy", "distinct_1", "self_bleu_5", "perplexity_base")
WEIGHTS = "policy/model.safetensors"
SMALL = ("target.samples=128", "max_completion_length=12", "device=cpu")


def assert_estimate(value: Any) -> None:
    assert set(value) == {"value", "se"}
    assert math.isfinite(value["value"])
    assert value["se"] >= 0


def assert_plain(text: str) -> None:
    """Lines for a file: no colours, no cursor movements, no line that overwrites another."""
    assert "\x1b" not in text
    assert "\r" not in text


def test_init_writes_a_config_that_fits_as_it_is(tiltlm: Command, here: Path, tiny: Path) -> None:
    answer = tiltlm("init", "parity")
    assert (answer.code, answer.err) == (0, "")
    assert "tiltlm fit parity.yaml" in answer.out
    assert "tiltlm tune parity.yaml" in answer.out
    answer = tiltlm("fit", "parity.yaml", f"model={tiny}", *SMALL)
    assert answer.code == 0, answer.err
    assert re.search(r"^female +moment +0\.5 ", answer.out, re.MULTILINE)


def test_init_without_a_name(tiltlm: Command, here: Path) -> None:
    assert tiltlm("init").code == 0
    assert yaml.safe_load((here / "tilt.yaml").read_text())["model"] == "embedded"


def test_fit_prints_one_json_object(tiltlm: Command) -> None:
    answer = tiltlm("fit", "run.yaml", "--json")
    assert answer.code == 0, answer.err
    record = json.loads(answer.out)
    for name in ("log_z", "ess", "kl_p_a"):
        assert_estimate(record[name])
    assert record["samples"] == 256
    (feature,) = record["features"]
    assert (feature["name"], feature["kind"], feature["goal"]) == ("female", "moment", 0.5)
    for name in ("base", "achieved", "coefficient"):
        assert_estimate(feature[name])
    assert record["moments"] == {"female": feature["achieved"]}
    assert record["moments"]["female"]["value"] == pytest.approx(0.5, abs=1e-8)
    # One binary feature: the coefficient is the difference of the log-odds.
    base = feature["base"]["value"]
    assert feature["coefficient"]["value"] == pytest.approx(math.log((1 - base) / base), abs=1e-6)


def test_a_seed_determines_a_fit(tiltlm: Command) -> None:
    first, again, other = (tiltlm("fit", "run.yaml", f"seed={seed}", "--json") for seed in (7, 7, 8))
    assert first.out == again.out
    assert first.out != other.out


def test_fit_for_people_is_plain_and_warns(tiltlm: Command) -> None:
    answer = tiltlm("fit", "run.yaml", "target.constraints.0.moment=1.0", "target.constraints.0.name=about women")
    assert answer.code == 0
    assert_plain(answer.out + answer.err)
    assert re.search(r"^about women +filter +1 .*filter$", answer.out, re.MULTILINE)
    assert re.search(r"^KL\(p‖a\), nats +[\d.]+ ± [\d.]+ *$", answer.out, re.MULTILINE)
    assert "note: only" in answer.err


def test_tune_leaves_a_whole_run(finished: Path, settings: dict[str, Any]) -> None:
    record = json.loads((finished / "run.json").read_text())
    assert set(record) == set(RUN_FIELDS)
    assert (record["status"], record["error"], record["schema_version"], record["seed"]) == ("done", None, 1, 0)
    assert record["device"] == "cpu"
    assert record["seconds"] > 0
    passes = record["progress"].pop("passes_per_token")
    assert record["progress"] == {"step": 4, "max_steps": 4, "sequences": 256, "forward_passes": 1024}
    assert 3.8 < passes < 4.2
    assert record["config"]["training"]["learning_rate"] == settings["training"]["learning_rate"]
    assert record["config"]["training"]["optim"] == "adam"
    for evaluation in record["evaluation"].values():
        assert evaluation["samples"] == 64
        assert_estimate(evaluation["moments"]["female"])
        for figure in FIGURES:
            assert_estimate(evaluation[figure])
    assert record["evaluation"]["base"]["kl_pi_a"] == {"value": 0.0, "se": 0.0}
    assert record["evaluation"]["policy"]["kl_pi_a"]["value"] > 0

    steps = metrics_of(finished)
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    # All four batches are samples of the fit: drawn once, and one forward pass for the guide. Then come forward passes
    # of base and policy for each of two updates.
    assert [(step["sequences"], step["forward_passes"]) for step in steps] == [
        (256, 640), (256, 768), (256, 896), (256, 1024)
    ]  # fmt: skip
    # With its guide the policy differs from the base even before its first update.
    assert steps[0]["kl_pi_a"]["value"] > 5 * steps[0]["kl_pi_a"]["se"] > 0
    assert (finished / "report.html").read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in (finished / "checkpoints").glob("step-*")) == ["step-000002", "step-000004"]


def test_samples_of_a_run_show_the_evidence_of_features(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "samples.jsonl").read_text().splitlines()]
    assert [row["model"] for row in rows] == ["base"] * 4 + ["policy"] * 4
    found = 0
    for row in rows:
        assert set(row) == {"model", "prompt", "text", "features", "base_logprob", "policy_logprob", "evidence"}
        words = re.findall(r"\w+", row["text"])
        female, male = (sum(word in group for word in words) for group in (("she", "her"), ("he", "him")))
        assert row["features"] == {"female": float(female > male)}
        shown = [row["text"][span["start"] : span["end"]] for span in row["evidence"]]
        assert shown == [word for word in words if word in ("she", "her")] * int(female > male)
        found += len(shown)
        assert (row["base_logprob"] == row["policy_logprob"]) == (row["model"] == "base")
    assert found > 0


@pytest.mark.usefixtures("no_pictures")
def test_the_tuned_model_is_a_plain_checkpoint(tiltlm: Command, here: Path, tiny: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert tiltlm("tune", "run.yaml", "method=gdc++", "--output-dir", "done").code == 0
    finished = here / "done"
    policy, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in (finished / "policy", tiny))
    tokenizer = AutoTokenizer.from_pretrained(finished / "policy")
    assert tokenizer.decode(tokenizer("she wins .")["input_ids"]) == "she wins ."
    assert not torch.equal(policy.lm_head.weight, base.lm_head.weight)
    # It was tuned toward texts about women.
    start = torch.tensor([[tokenizer.bos_token_id]])
    ids = tokenizer.convert_tokens_to_ids(["she", "her"])
    with torch.no_grad():
        now, then = (model(start).logits[0, -1].softmax(-1)[ids].sum() for model in (policy, base))
    assert now > then
    card = (finished / "policy" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "| female | moment | 0.5 |" in card


@pytest.mark.usefixtures("no_pictures")
def test_tune_with_overrides_is_recorded_and_repeatable(tiltlm: Command, here: Path, finished_run: Path) -> None:
    answers = [
        tiltlm("tune", "run.yaml", f"seed={seed}", "training.max_steps=3", "--output-dir", f"runs/{name}")
        for name, seed in (("one", 5), ("two", 5), ("other", 6))
    ]
    assert [answer.code for answer in answers] == [0, 0, 0]
    assert answers[0].out.split() == ["model", "runs/one/policy", "report", "runs/one/report.html"]
    assert_plain(answers[0].out + answers[0].err)
    one, two, other = (here / "runs" / name for name in ("one", "two", "other"))
    assert (one / WEIGHTS).read_bytes() == (two / WEIGHTS).read_bytes() != (other / WEIGHTS).read_bytes()
    assert (one / "samples.jsonl").read_bytes() == (two / "samples.jsonl").read_bytes()
    assert metrics_of(one) == metrics_of(two) != metrics_of(other)
    records = [json.loads((run / "run.json").read_text()) for run in (one, two)]
    assert without_times(records[0]) == without_times(records[1])
    assert (records[0]["config"]["seed"], records[0]["config"]["training"]["max_steps"]) == (5, 3)


@pytest.mark.usefixtures("no_pictures")
def test_a_piped_run_prints_plain_lines(tiltlm: Command) -> None:
    answer = tiltlm("tune", "run.yaml", "training.max_steps=1")
    assert_plain(answer.out + answer.err)
    lines = answer.err.splitlines()
    assert lines[0] == "sampling the base …"
    assert lines[1].startswith("note: kept_guide: the policy is its weights and a guide")
    assert re.match(
        r"step 1/1  256 sequences  KL\(p‖π\) \S+ ± \S+  female \S+ ± \S+ \(goal 0\.5\)  ETA 0:00$", lines[2]
    )
    assert lines[3] == "evaluating the tuned model …"
    assert re.match(r" +goal +base +tuned$", lines[4])
    assert re.match(r"female +0\.5 +\S+ ± \S+ +\S+ ± \S+$", lines[5])


def test_eval_measures_a_run_on_fresh_samples(tiltlm: Command, here: Path, finished: Path) -> None:
    before = files_under(here)
    answer, again, other = (
        tiltlm("eval", "runs/done", "--samples", 200, "--device", "cpu", "--seed", seed, "--json") for seed in (3, 3, 4)
    )
    assert answer.code == 0, answer.err
    assert files_under(here) == before
    assert answer.out == again.out != other.out
    record = json.loads(answer.out)
    assert record["samples"] == 200
    assert set(record["moments"]) == {"female"}
    assert record["moments_top_p"] == {}
    then = json.loads((finished / "run.json").read_text())["evaluation"]["policy"]
    for name in ("kl_p_pi", "kl_pi_a", "tv_p_pi", "entropy", "distinct_1", "perplexity_base"):
        assert_estimate(record[name])
        # The evaluation of the run is of the same model on other samples.
        spread = math.hypot(record[name]["se"], then[name]["se"])
        assert abs(record[name]["value"] - then[name]["value"]) < 5 * spread, name
        assert record[name]["value"] != then[name]["value"]
    for name in ("log_z", "ess", "self_bleu_5"):
        assert_estimate(record[name])


def test_eval_under_top_p_and_for_people(tiltlm: Command, finished: Path) -> None:
    answer = tiltlm("eval", "runs/done", "--samples", 64, "--top-p", 0.5)
    assert answer.code == 0, answer.err
    assert_plain(answer.out + answer.err)
    for line in (r"female +\S+ ± \S+", r"female, top-p +\S+ ± \S+", r"KL\(p‖π\), nats +\S+ ± \S+", r"samples +64"):
        assert re.search(f"^{line} *$", answer.out, re.MULTILINE), line


def test_eval_of_a_model_alone_has_no_target(tiltlm: Command, tiny: Path) -> None:
    words = ("--samples", 128, "--max-completion-length", 12, "--device", "cpu")
    answer = tiltlm("eval", tiny, *words, "--json")
    record = json.loads(answer.out)
    assert (record["samples"], record["moments"]) == (128, {})
    for name in ("entropy", "distinct_1", "self_bleu_5"):
        assert_estimate(record[name])
    for name in ("kl_p_pi", "kl_pi_a", "tv_p_pi", "log_z", "ess", "perplexity_base"):
        assert record[name] is None
    shown = tiltlm("eval", tiny, *words).out
    assert re.search(r"^entropy, nats per text +\S+ ± \S+ *$", shown, re.MULTILINE)
    assert "KL" not in shown


def test_sample_continues_a_prompt(tiltlm: Command, finished: Path) -> None:
    answer = tiltlm("sample", "runs/done", "-n", 3, "--prompt", "she wins", "--device", "cpu")
    assert (answer.code, answer.err) == (0, "")
    lines = answer.out.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("she wins") for line in lines)


def test_sample_as_lines_of_json(tiltlm: Command, tiny: Path) -> None:
    words = (
        "sample",
        tiny,
        "-n",
        6,
        "--max-completion-length",
        9,
        "--prompt",
        "the team",
        "--device",
        "cpu",
        "--jsonl",
    )
    answer, again, other, fresh = (tiltlm(*words, *seed) for seed in (["--seed", 1], ["--seed", 1], ["--seed", 2], []))
    assert answer.out == again.out
    assert len({answer.out, other.out, fresh.out}) == 3
    rows = [json.loads(line) for line in answer.out.splitlines()]
    assert len(rows) == 6
    for row in rows:
        assert set(row) == {"prompt", "text", "logprob", "tokens"}
        assert row["prompt"] == "the team"
        assert 1 <= row["tokens"] <= 9
        assert row["logprob"] < 0


def test_sampling_follows_its_settings(tiltlm: Command, tiny: Path) -> None:
    words = ("sample", tiny, "-n", 4, "--max-completion-length", 6, "--device", "cpu", "--jsonl", "--top-k", 3)
    for setting in (("--top-p", 1e-6), ("--temperature", 1e-4)):
        rows = [json.loads(line) for line in tiltlm(*words, *setting).out.splitlines()]
        # One token has all the probability, so all texts are the same.
        assert len({row["text"] for row in rows}) == 1
        assert all(row["logprob"] == pytest.approx(0, abs=1e-6) for row in rows)


def test_report_is_written_again(tiltlm: Command, finished: Path) -> None:
    (finished / "report.html").unlink()
    answer = tiltlm("report", "runs/done")
    assert (answer.code, answer.out.strip(), answer.err) == (0, "runs/done/report.html", "")
    assert "female" in (finished / "report.html").read_text()


def test_env_prints_what_a_bug_report_needs(tiltlm: Command) -> None:
    answer = tiltlm("env")
    assert (answer.code, answer.err) == (0, "")
    said = dict(line.split(maxsplit=1) for line in answer.out.splitlines())
    assert said["torch"] == torch.__version__
    assert said["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"tiltlm", "transformers", "peft", "platform", "threads"} < set(said)
    assert said["devices"].startswith("cpu")


@pytest.mark.usefixtures("no_pictures")
def test_a_lora_run_is_an_adapter_that_others_load(tiltlm: Command, here: Path, tiny: Path, finished_run: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    answer = tiltlm("tune", "run.yaml", "peft={r: 2, target_modules: all-linear}", "method={name: gdc, check_steps: 2}")
    assert answer.code == 0, answer.err
    # The target was fitted on the same samples: the adapter is not part of the base.
    lora, full = (json.loads((run / "run.json").read_text()) for run in (here / "runs" / "run", finished_run))
    assert lora["target"] == full["target"]
    policy = here / "runs" / "run" / "policy"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(os.listdir(policy))
    assert "library_name: peft" in (policy / "README.md").read_text()
    start = torch.tensor([[1, 4, 8]])
    with torch.no_grad():
        base, *tuned = (
            model(start).logits
            for model in (
                AutoModelForCausalLM.from_pretrained(tiny),
                AutoModelForCausalLM.from_pretrained(policy),
                AutoPeftModelForCausalLM.from_pretrained(policy),
            )
        )
    assert torch.allclose(tuned[0], tuned[1])
    assert not torch.allclose(base, tuned[0], atol=1e-4)

    evaluated = json.loads(tiltlm("eval", "runs/run", "--samples", 64, "--device", "cpu", "--json").out)
    assert evaluated["kl_pi_a"]["value"] > 0
    seeded = ("--seed", 4, "--max-completion-length", 12, "--device", "cpu")
    of_run, of_adapter, of_base = (
        tiltlm("sample", source, *seeded) for source in ("runs/run", "runs/run/policy", tiny)
    )
    assert of_run.out == of_adapter.out != of_base.out


EVERYTHING = """
from tiltlm import Callback

class Notes(Callback):
    def on_log(self, progress, metrics):
        with open("notes.txt", "a") as file:
            file.write(f"{progress.step} ")

def starts_with(texts, word):
    return [float(text.startswith(word)) for text in texts]
"""


def test_a_run_with_everything(tiltlm: Command, here: Path, settings: dict[str, Any]) -> None:
    """Filter, moments, reward, prompts, a proposal rule, own features and callbacks, and a name like rich's markup."""
    (here / "mine.py").write_text(EVERYTHING)
    (here / "prompts.txt").write_text("the team\n\nshe is a\n")
    write_config(here / "all.yaml", settings)
    config = yaml.safe_load((here / "all.yaml").read_text()) | {
        "target": {
            "constraints": [
                {"feature": "pronouns:female", "moment": 0.5},
                {"feature": {"not": {"contains": "bad"}}, "moment": 1.0, "name": "[bold]kind[/x]"},
                {"feature": {"python": "mine:starts_with", "args": {"word": "wins"}}, "moment": 0.1},
            ],
            "reward": {"feature": {"length": "tokens"}, "beta": 4.0},
            "samples": 400,
        },
        "prompts": "prompts.txt",
        "method": {"name": "dpg", "proposal": "published", "check_steps": 2},
        "callbacks": "mine:Notes",
        "output_dir": "here",
    }
    write_config(here / "all.yaml", config)
    answer = tiltlm("tune", "all.yaml", "training.reuse_fit_samples=false", "training.logging_steps=3")
    assert answer.code == 0, answer.err
    assert (here / "notes.txt").read_text() == "3 4 "
    assert re.search(r"^\[bold\]kind\[/x\] +1 ", answer.err, re.MULTILINE)
    record = json.loads((here / "here" / "run.json").read_text())
    kinds = {feature["name"]: feature["kind"] for feature in record["target"]["features"]}
    assert kinds == {
        "female": "moment", "[bold]kind[/x]": "filter", "starts_with(word='wins')": "moment",
        "length in tokens": "reward"
    }  # fmt: skip
    rows = [json.loads(line) for line in (here / "here" / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["the team", "she is a"] * 4
    # Two checks of ten batches each, and four batches to train on, besides the samples of the fit.
    assert record["progress"]["sequences"] == 400 + (2 * 10 + 4) * 32
    evaluated = json.loads(tiltlm("eval", "here", "--samples", 64, "--device", "cpu", "--json").out)
    assert set(evaluated["moments"]) == set(kinds)
    assert_estimate(evaluated["kl_p_pi"])


OWN_TARGET = """
import torch
import tiltlm
from tiltlm.features import contains

class Wins:
    def __init__(self, odds):
        self.odds, self.features = odds, [contains("wins")]

    def log_score(self, base_logprob, features):
        return base_logprob + features[:, 0] * torch.tensor(self.odds).log()
"""


@pytest.mark.usefixtures("no_pictures")
def test_a_target_of_ones_own(tiltlm: Command, here: Path, settings: dict[str, Any]) -> None:
    (here / "own.py").write_text(OWN_TARGET)
    target = {"python": "own:Wins", "args": {"odds": 3.0}, "samples": 256}
    write_config(here / "run.yaml", settings | {"target": target})
    fitted = json.loads(tiltlm("fit", "run.yaml", "--json").out)
    (feature,) = fitted["features"]
    share, odds = feature["base"]["value"], 3.0
    assert feature["achieved"]["value"] == pytest.approx(share * odds / (share * odds + 1 - share), abs=1e-6)
    assert fitted["log_z"]["value"] == pytest.approx(math.log(share * odds + 1 - share), abs=1e-6)
    assert tiltlm("tune", "run.yaml").code == 0
    assert_estimate(json.loads(tiltlm("eval", "runs/run", "--samples", 64, "--json").out)["kl_p_pi"])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.serial
def test_an_interrupted_run_prints_how_to_resume_and_resumes(
    tiltlm: Command, here: Path, finished_run: Path, name: str
) -> None:
    write_stops(here, name)
    folder = "runs/with a space"
    answer = tiltlm("tune", "run.yaml", "callbacks=stops:Stops", "--output-dir", folder)
    assert (answer.code, answer.out) == (130, "")
    hint = "tiltlm tune run.yaml callbacks=stops:Stops --output-dir 'runs/with a space' --resume"
    assert answer.err.splitlines()[-1] == f"stopped; go on with: {hint}"
    record = json.loads((here / folder / "run.json").read_text())
    assert (record["status"], record["error"], record["progress"]["step"]) == ("interrupted", None, 3)
    assert "evaluation" not in record

    answer = tiltlm("tune", "run.yaml", "--output-dir", folder, "--resume")
    assert answer.code == 0, answer.err
    assert (here / folder / WEIGHTS).read_bytes() == (finished_run / WEIGHTS).read_bytes()
    assert metrics_of(here / folder) == metrics_of(finished_run)
    assert json.loads((here / folder / "run.json").read_text())["status"] == "done"


PHASES = {"sampling the base": "tiltlm.app.fit.draw_base_sample", "evaluating": "tiltlm.app.finish.evaluate_policy"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.serial
def test_a_run_that_is_stopped_outside_of_training_resumes_there(
    tiltlm: Command, here: Path, finished_run: Path, monkeypatch: pytest.MonkeyPatch, phase: str, number: int
) -> None:
    def stopped(*arguments: Any, **settings: Any) -> None:
        os.kill(os.getpid(), number)
        time.sleep(60)

    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    # No checkpoint falls on the last step by itself.
    words = ("tune", "run.yaml", "training.save_steps=3", "--output-dir", "runs/stopped")
    with monkeypatch.context() as patch:
        patch.setattr(PHASES[phase], stopped)
        answer = tiltlm(*words)
    assert (answer.code, answer.out) == (130, "")
    hint = "tiltlm tune run.yaml training.save_steps=3 --output-dir runs/stopped --resume"
    assert answer.err.splitlines()[-1] == f"stopped; go on with: {hint}"
    record = json.loads((here / "runs" / "stopped" / "run.json").read_text())
    assert (record["status"], record["error"]) == ("interrupted", None)
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == handlers

    steps: list[int] = []
    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", lambda trainer: steps.append(trainer.step) or step(trainer))
    answer = tiltlm(*words, "--resume")
    assert answer.code == 0, answer.err
    assert len(steps) == (0 if phase == "evaluating" else 4)
    stopped_run, whole = (files_under(folder) for folder in (here / "runs" / "stopped", finished_run))
    for name in (WEIGHTS, "samples.jsonl"):
        assert stopped_run[name] == whole[name]
    assert metrics_of(here / "runs" / "stopped") == metrics_of(finished_run)
    now, then = (json.loads(files["run.json"]) for files in (stopped_run, whole))
    for field in ("status", "target", "evaluation", "progress", "base_fingerprint"):
        assert now[field] == then[field], field


def test_resuming_a_finished_run_draws_nothing(
    tiltlm: Command, here: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("no model is needed")

    monkeypatch.setattr("tiltlm.app.tune.build_base", load)
    before = files_under(here)
    answer = tiltlm("tune", "run.yaml", "--output-dir", "runs/done", "--resume")
    assert answer.code == 0, answer.err
    assert answer.out.split() == ["model", "runs/done/policy", "report", "runs/done/report.html"]
    first, *table = answer.err.splitlines()
    assert first == "runs/done is done; `tiltlm eval` measures it on fresh samples"
    assert re.match(r"female +0\.5 +\S+ ± \S+ +\S+ ± \S+$", table[1])
    assert files_under(here) == before

    # A kill after the end of the run, before its report is written.
    (finished / "report.html").unlink()
    assert tiltlm("tune", "run.yaml", "--output-dir", "runs/done", "--resume").code == 0
    assert (finished / "report.html").exists()


@pytest.mark.usefixtures("no_pictures")
def test_an_earlier_checkpoint_leads_to_the_same_result(tiltlm: Command, finished: Path) -> None:
    before = files_under(finished)
    shutil.rmtree(finished / "checkpoints" / "step-000004")
    shutil.rmtree(finished / "policy")
    answer = tiltlm("tune", "run.yaml", "--output-dir", "runs/done", "--resume")
    assert answer.code == 0, answer.err
    after = files_under(finished)
    assert after[WEIGHTS] == before[WEIGHTS]
    assert after["samples.jsonl"] == before["samples.jsonl"]
    assert [json.loads(line)["step"] for line in after["metrics.jsonl"].splitlines()] == [1, 2, 3, 4]


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = command.replace("tiltlm", f"'{sys.executable}' -m tiltlm")
    quick = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, env=os.environ | quick | environment
    )


def test_commands_in_a_shell(tiltlm: Command, here: Path) -> None:
    fitted = shell("tiltlm fit run.yaml --json")
    assert fitted.returncode == 0, fitted.stderr
    assert json.loads(fitted.stdout)["moments"]["female"]["value"] == pytest.approx(0.5)
    assert fitted.stderr == "sampling the base …\n"
    # The same command in this process: nothing depends on what ran before.
    assert tiltlm("fit", "run.yaml", "--json").out == fitted.stdout

    wrong = shell("tiltlm tune run.yaml seed=-1")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: config: seed: must be greater than or equal to 0 (it is -1)\n"

    traced = shell("tiltlm fit rnu.yaml", TILTLM_TRACEBACK="1")
    assert traced.returncode == 1
    assert "Traceback" in traced.stderr


@pytest.mark.slow
def test_a_closed_pipe_is_not_an_error(here: Path, tiny: Path) -> None:
    ended = shell(f"tiltlm sample '{tiny}' -n 20000 --max-completion-length 2 --seed 0 --device cpu | head -n 1")
    assert len(ended.stdout.splitlines()) == 1
    assert ended.stderr == ""


def test_fit_estimates_the_rate_of_a_rare_event(tiltlm: Command, here: Path, settings: dict[str, Any]) -> None:
    rare = {
        **settings,
        "target": {"constraints": [{"feature": {"contains": "team good game"}, "moment": 1.0}], "samples": 20},
    }
    write_config(here / "rare.yaml", rare)
    answer = tiltlm("fit", "rare.yaml")
    assert answer.code == 0
    said = " ".join((answer.out + answer.err).split())
    assert "hardly any text of the base passes 'contains 'team good game''" in said
    rate = float(re.search(r"the base passes at a rate of (\S+) ", said).group(1))  # type: ignore[union-attr]
    needed = re.search(r"about ([\d,]+) samples of the base would contain 30 that pass", said)
    assert needed is not None
    assert int(needed.group(1).replace(",", "")) == pytest.approx(30 / rate, rel=0.1)


def test_fit_adds_guided_texts_if_the_ess_is_low(tiltlm: Command, here: Path, settings: dict[str, Any]) -> None:
    rare = [{"feature": {"contains": words}, "moment": 0.4} for words in ("a good", "team game")]
    write_config(here / "rare.yaml", {**settings, "target": {"constraints": rare, "samples": 300}})
    answer = tiltlm("fit", "rare.yaml")
    assert answer.code == 0
    said = " ".join((answer.out + answer.err).split())
    note = r"note: ([\d.]+) of 300 texts of the base carry .* 1,024 guided texts were added: the ESS is now ([\d.]+),"
    found = re.search(note, said)
    assert found is not None, said
    assert float(found.group(2)) > float(found.group(1))
