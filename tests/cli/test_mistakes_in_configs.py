"""Wrong run files: one message that names field, value and fix, exit code 2, and nothing is written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

import tiltlm
from command_line import Command, assert_one_error, files_under, write_config
from tiltlm.errors import UsageError

FEMALE = {"pronouns": "female"}
FILES = {
    "empty.txt": "# only a comment\n\n",
    "blank.txt": "\n \n",
    "rows.jsonl": '{"prompt": "a", "word": "b"}\n',
    "mine.py": """
import tiltlm

class NoCallback:
    pass

class Closed(tiltlm.Callback):
    def __init__(self):
        raise ValueError("the door is shut")

class NoTarget:
    pass

text = "not an objective"

def needs_more(a_number):
    return tiltlm.Callback()
""",
}


def constraint(feature: Any, moment: Any = 0.5, **more: Any) -> dict[str, Any]:
    return {"target.constraints": [{"feature": feature, "moment": moment, **more}]}


# What differs from a run file that is right (None deletes the key), and what the message must say.
MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": ({"modle": "embedded"}, ["unknown key 'modle'", "did you mean 'model'"]),
    "unknown key of a section": (
        {"training.learning_rat": 0.1},
        ["unknown key 'training.learning_rat'", "did you mean 'learning_rate'"],
    ),
    "unknown key of the target": ({"target.sample": 9}, ["'target.sample'", "did you mean 'samples'"]),
    "unknown key in a list": (
        constraint(FEMALE, momnt=0.5),
        ["'target.constraints.0.momnt'", "did you mean 'moment'"],
    ),
    "unknown key of a feature": (
        constraint({"contains": {"phrase": "team", "ignorecase": True}}),
        ["target.constraints.0.feature", "'ignorecase'", "did you mean 'ignore_case'"],
    ),
    "unknown key of the method": ({"method": {"nam": "gdc"}}, ["'method.nam'", "did you mean 'name'"]),
    "unknown key of peft": ({"peft": {"r": 4, "lora_alfa": 8}}, ["peft", "'lora_alfa'", "did you mean 'lora_alpha'"]),
    "a key of peft that is ours": ({"peft": {"seed": 4}}, ["peft", "'seed'"]),
    "several mistakes": (
        {"sede": 1, "training.max_steps": -1, "evaluation.top_p": 2},
        ["'sede'", "did you mean 'seed'", "training.max_steps", "-1", "evaluation.top_p", "2"],
    ),
    "no model": ({"model": None}, ["'model' is missing"]),
    "no target": ({"target": None}, ["'target' is missing"]),
    "no moment": ({"target.constraints": [{"feature": FEMALE}]}, ["'target.constraints.0.moment' is missing"]),
    "no constraints": ({"target.constraints": []}, ["target", "give constraints or a reward"]),
    "target that is no mapping": ({"target": "female"}, ["target", "'female'", "keys and values"]),
    "training that is no mapping": ({"training": 3}, ["training", "3", "keys and values"]),
    "text for a number": ({"training.max_steps": "ten"}, ["training.max_steps", "'ten'", "integer"]),
    "fraction for a whole number": ({"training.batch_size": 1.5}, ["training.batch_size", "1.5", "integer"]),
    "yes for a number": (constraint(FEMALE, moment=True), ["target.constraints.0.moment", "True", "number"]),
    "number for text": ({"model": 7}, ["model", "7", "string"]),
    "number for prompts": ({"prompts": 7}, ["prompts", "string", "list", "mapping", "7"]),
    "unknown key of prompts": ({"prompts": {"pth": "a.txt"}}, ["'prompts.pth'", "did you mean 'path'"]),
    "prompts from nowhere": ({"prompts": {"column": "question"}}, ["prompts", "path", "dataset"]),
    "prompts from two places": ({"prompts": {"path": "a.txt", "dataset": "b"}}, ["prompts", "path", "dataset"]),
    "no whole number of prompts": (
        {"prompts": {"path": "a.txt", "samples": 0}},
        ["prompts.samples", "0", "equal to 1"],
    ),
    "number for a feature": (constraint(5), ["target.constraints.0.feature", "5"]),
    "list for a mapping": ({"peft": ["r"]}, ["peft", "['r']"]),
    "negative learning rate": ({"training.learning_rate": -1e-4}, ["training.learning_rate", "-0.0001", "greater"]),
    "infinite learning rate": ({"training.learning_rate": float("inf")}, ["training.learning_rate", "inf", "finite"]),
    "batch size of zero": ({"training.batch_size": 0}, ["training.batch_size", "0", "greater than or equal to 1"]),
    "zero samples": ({"target.samples": 0}, ["target.samples", "0", "greater than or equal to 2"]),
    "zero samples to evaluate": ({"evaluation.samples": 0}, ["evaluation.samples", "0"]),
    "negative seed": ({"seed": -1}, ["seed", "-1"]),
    "beta of zero": (
        {"target.reward": {"feature": {"length": "words"}, "beta": 0}},
        ["target.reward.beta", "0", "greater than 0"],
    ),
    "moment above one": (constraint(FEMALE, moment=1.2), ["'female'", "moment 1.2", "[0, 1]"]),
    "moment below zero": (constraint(FEMALE, moment=-0.1), ["'female'", "-0.1", "[0, 1]"]),
    "moment of zero": (constraint(FEMALE, moment=0), ["'female'", "moment 0", "opposite"]),
    "moment that is no number": (constraint(FEMALE, moment=float("nan")), ["target.constraints.0.moment", "finite"]),
    "unknown feature": (
        constraint({"contians": "team"}),
        ["target.constraints.0.feature", "'contians'", "did you mean 'contains'"],
    ),
    "unknown feature of the reward": ({"target.reward": {"feature": "femal"}}, ["target.reward.feature", "'femal'"]),
    "unknown word list": (constraint({"wordlist": "sprots"}), ["'sprots'", "did you mean 'sports'"]),
    "missing word list": (constraint({"wordlist": "lists/war.txt"}), ["wordlist", "lists/war.txt", "No such file"]),
    "empty word list": (constraint({"wordlist": "empty.txt"}), ["wordlist", "empty.txt", "no words"]),
    "bad regex": (constraint({"regex": "wins("}), ["'wins('", "does not compile", "position 4"]),
    "no such function": (constraint({"python": "mine:brevity"}), ["mine", "brevity"]),
    "no such module": (constraint({"python": "my_rewads:brevity"}), ["my_rewads", "no module"]),
    "two features of one name": (
        {"target.constraints": [{"feature": FEMALE, "moment": 0.5}, {"feature": FEMALE, "moment": 0.4}]},
        ["'female'", "another name"],
    ),
    "unknown method": ({"method": "gdc+"}, ["method.name", "'gdc+'", "did you mean 'gdc++'"]),
    "method that is no objective": ({"method": "mine:text"}, ["method.name", "mine:text", "coefficients(record)"]),
    "arguments of a method that has none": ({"method": {"name": "gdc", "args": {"a": 1}}}, ["method.args", "'a'"]),
    "unknown argument of a method": (
        {"method": {"name": "ppo", "args": {"clipp": 0.1}}},
        ["method.args", "ppo has no 'clipp'", "did you mean 'clip'"],
    ),
    "wrong argument of a method": (
        {"method": {"name": "alpha_dpg", "args": {"alpha": 1.5}}},
        ["method.args.alpha", "1.5", "from 0 to 1"],
    ),
    "unknown choice of a method": (
        {"method": {"name": "f_dpg", "args": {"divergence": "jss"}}},
        ["method.args.divergence", "'jss'", "did you mean 'js'"],
    ),
    "unknown baseline": (
        {"method": {"name": "reinforce", "args": {"baseline": "average"}}},
        ["method.args.baseline", "'average'", "leave_one_out"],
    ),
    "method that is infinite where a filter rules out": (
        {"method": "vargrad", **constraint(FEMALE, 1.0)},
        ["method.name", "vargrad cannot reach a target with the filter", "log P is −∞"],
    ),
    "divergence that is infinite where a filter rules out": (
        {"method": {"name": "f_dpg", "args": {"divergence": "reverse_kl"}}, **constraint(FEMALE, 1.0)},
        ["method.name", "choose kl, js, tv or chi2"],
    ),
    "off-policy proposal of an on-policy method": (
        {"method": {"name": "grpo", "proposal": "kl"}},
        ["method.proposal", "grpo trains on the policy's own samples"],
    ),
    "several updates of a method that compares a batch": (
        {"method": "brain", "training.num_iterations": 3},
        ["training.num_iterations", "3 is too many for brain"],
    ),
    "pool that nothing trains on": (
        {"method": "guided", "training.pool": 500},
        ["training.pool", "set training.num_iterations to 2 or more"],
    ),
    "pool of a method that does not mix": (
        {"method": "rloo", "training.pool": 500, "training.num_iterations": 2},
        ["training.pool", "use pooled, gdc++ or another method"],
    ),
    "unknown proposal": ({"method.proposal": "intervall"}, ["method.proposal", "did you mean 'interval'"]),
    "unknown optimizer": ({"training.optim": "adamm"}, ["training.optim", "'adamm'", "did you mean 'adam"]),
    "bad argument of the optimizer": ({"training.optim_args": {"betta": 1}}, ["training.optim", "betta"]),
    "two learning rates": ({"training.optim_args": {"lr": 3}}, ["training.optim_args", "3", "training.learning_rate"]),
    "unknown scheduler": (
        {"training.lr_scheduler_type": "cosin"},
        ["training.lr_scheduler_type", "'cosin'", "did you mean 'cosine'"],
    ),
    "scheduler that follows a metric": (
        {"training.lr_scheduler_type": "reduce_lr_on_plateau"},
        ["training.lr_scheduler_type", "'reduce_lr_on_plateau'", "such as linear"],
    ),
    "argument that the scheduler misses": (
        {"training.lr_scheduler_type": "cosine_with_min_lr"},
        ["training.lr_scheduler_kwargs", "cosine_with_min_lr", "min_lr"],
    ),
    "warm-up of a schedule that has none": (
        {"training.lr_scheduler_type": "constant", "training.warmup_steps": 5},
        ["training.warmup_steps", "5", "'constant'", "constant_with_warmup"],
    ),
    "argument of a scheduler that takes none": (
        {"training.lr_scheduler_kwargs": {"num_cycles": 2}},
        ["training.lr_scheduler_kwargs", "'num_cycles'", "'constant_with_warmup'", "leave them out"],
    ),
    "optimizer that does not fit": ({"training.optim": "lbfgs"}, ["training.optim", "'lbfgs'", "such as adam"]),
    "bf16 and fp16": ({"training.bf16": True, "training.fp16": True}, ["training.bf16", "training.fp16", "choose one"]),
    "unknown device": ({"device": "gpu"}, ["device", "'gpu'", "cpu or cuda"]),
    "unknown dtype": ({"dtype": "float23"}, ["dtype", "'float23'", "did you mean 'float32'"]),
    "unknown tracker": ({"report_to": "tensorbord"}, ["report_to", "'tensorbord'", "did you mean 'tensorboard'"]),
    "tracker that is not installed": ({"report_to": ["swanlab"]}, ["report_to", "'swanlab'", "pip install swanlab"]),
    "callback that is none": ({"callbacks": "mine:NoCallback"}, ["callbacks", "'mine:NoCallback'", "tiltlm.Callback"]),
    "callback that wants arguments": ({"callbacks": "mine:needs_more"}, ["callbacks", "mine:needs_more", "a_number"]),
    "callback that raises": ({"callbacks": "mine:Closed"}, ["callbacks", "mine:Closed", "the door is shut"]),
    "callback that is not there": ({"callbacks": "mine:Clsed"}, ["callbacks", "'Clsed'", "did you mean 'Closed'"]),
    "target that is none": (
        {"target": {"python": "mine:NoTarget"}},
        ["target.python", "'mine:NoTarget'", "log_score(base_logprob, features)"],
    ),
    "two kinds of target": ({"target.python": "mine:NoTarget"}, ["target", "or else python"]),
    "missing prompts": ({"prompts": "prompts.txt"}, ["prompts", "prompts.txt", "No such file"]),
    "empty prompts": ({"prompts": "blank.txt"}, ["prompts", "blank.txt"]),
    "empty list of prompts": ({"prompts": []}, ["prompts"]),
    "a prompt that is none": ({"prompts": ["a", 2]}, ["prompts", "row 2", "2", "text"]),
    "prompts of another column": (
        {"prompts": {"path": "rows.jsonl", "column": "promt"}},
        ["prompts", "row 1", "rows.jsonl", "'promt'", "did you mean 'prompt'"],
    ),
    "peft of rank zero": ({"peft": {"r": 0}}, ["peft", "r", "positive"]),
    "peft of a module that is not there": ({"peft": {"target_modules": ["qproj"]}}, ["peft", "qproj", "not found"]),
    "peft that changes the base": (
        {"peft": {"init_lora_weights": "pissa"}},
        ["peft.init_lora_weights", "'pissa'", "base model", "'gaussian'"],
    ),
    "peft of a wrong type": ({"peft": {"r": "two"}}, ["peft", "'two'", "refused"]),
    "peft that trains biases": ({"peft": {"bias": "all"}}, ["peft.bias", "'all'", "'none'"]),
}


def changed(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    result = copy.deepcopy(settings)
    for key, value in changes.items():
        *parents, last = key.split(".")
        place = result
        for part in parents:
            place = place.setdefault(part, {})
        if value is None:
            del place[last]
        else:
            place[last] = value
    return result


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_config_is_refused_before_anything_is_written(
    tiltlm: Command, here: Path, settings: dict[str, Any], mistake: str
) -> None:
    changes, said = MISTAKES[mistake]
    write_config(here / "run.yaml", changed(settings, changes))
    for name, content in FILES.items():
        (here / name).write_text(content)
    before = files_under(here)
    answer = tiltlm("tune", "run.yaml")
    print(answer.err)
    assert_one_error(answer.err, said)
    assert "sampling" not in answer.err, "a mistake in the config must be found before the work begins"
    assert (answer.code, answer.out) == (2, "")
    assert files_under(here) == before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"learning_rat": 0.1}, "'training.learning_rat'; did you mean 'learning_rate'"),
        ({"max_steps": -1}, "training.max_steps: must be greater than or equal to 0"),
        ({"method": "gdc+"}, "method.name: 'gdc\\+' is not known"),
        ({"evaluation_samples": 0}, "evaluation.samples"),
        ({"seed": True}, "seed: must be a number"),
        ({"optim": "adamm"}, "training.optim: 'adamm'"),
        ({"peft": {"rank": 3}}, "peft: unknown setting 'rank'"),
    ],
)
def test_python_says_the_same(here: Path, tiny: Path, setting: dict[str, Any], message: str) -> None:
    base = tiltlm.LanguageModel.from_pretrained(tiny, device="cpu")
    target = tiltlm.constrain(base, {"pronouns:female": 0.5}, samples=64, max_completion_length=8)
    with pytest.raises(UsageError, match=message):
        tiltlm.tune(base, target, output_dir=here / "run", **setting)
    assert not (here / "run").exists()
