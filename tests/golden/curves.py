"""Short real runs of the embedded model: the curves that they gave when all was well, and the texts that they drew.

After a change that is meant to move them, write them anew and read the difference before it is committed:

    make golden

Rounding differs between CPUs and now and then makes another token of the same random number, after which all is
different. So a fresh run draws for itself, and then trains on the texts of the golden one: its figures must be equal.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tiltlm.app.build import build_base, build_roles
from tiltlm.app.display import Display
from tiltlm.app.fit import fit_run_target, stream
from tiltlm.app.plan import plan_run
from tiltlm.config.run import parse_config
from tiltlm.lm import LanguageModel, Samples
from tiltlm.targets import fit_target
from tiltlm.targets.base_sample import BaseSample, measure_samples
from tiltlm.training.callbacks import Callback
from tiltlm.training.metrics import StepMetrics
from tiltlm.training.progress import Progress
from tiltlm.training.rollout_batch import RolloutBatch
from tiltlm.training.trainer import Trainer

Rows = list[list[int]]

CURVES, TEXTS = (Path(__file__).with_name(name) for name in ("curves.json", "texts.json"))
STEPS = {"max_steps": 6, "batch_size": 24}
COMMON: dict[str, Any] = {
    "model": "embedded",
    "target": {"constraints": [{"feature": {"pronouns": "female"}, "moment": 0.5}], "samples": 192},
    "device": "cpu",
    "seed": 3,
}
RUNS: dict[str, dict[str, Any]] = {
    # Every batch is drawn from the policy as it stands.
    "gdc++, LoRA, Adam": {
        "method": {"name": "gdc++", "proposal": "on_policy"},
        "peft": {"r": 4, "target_modules": "all-linear"},
        "training": {**STEPS, "learning_rate": 3e-3, "reuse_fit_samples": False},
    },
    # Every batch is one of the fit's.
    "guided, all weights, SGD": {
        "method": {"name": "guided", "args": {"correction": 0, "feedback": 0.02}},
        "training": {
            **STEPS,
            "learning_rate": 0.01,
            "optim": "sgd",
            "optim_args": {"momentum": 0.9, "nesterov": True},
            "lr_scheduler_type": "linear",
            "warmup_steps": 2,
        },
    },
}


@dataclass(frozen=True)
class Outcome:
    """What a run measured, ready for JSON; what it drew, for the fit and at each step, and what it used instead."""

    curve: dict[str, Any]
    drawn: list[Samples]
    used: list[Samples]


# Time, what is nothing but rounding, and a count of the texts that were drawn, in place of which others are used.
NOT_OF_THE_CURVE = ("seconds", "mismatch", "passes_per_token")


class Recorder(Trainer, Callback):
    """A trainer that keeps what it measures and draws, and trains on ``texts``, a list for each step, if given."""

    def __init__(self, *args: Any, texts: Sequence[Rows], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(self)
        self.texts = texts
        self.lines: list[dict[str, Any]] = []
        self.drawn: list[Samples] = []
        self.used: list[Samples] = []

    def draw(self) -> RolloutBatch:
        batch = super().draw()
        if batch.reused:
            return batch
        samples = retold(batch.samples, self.texts[self.step - 1], self.roles.policy) if self.texts else batch.samples
        self.drawn.append(batch.samples)
        self.used.append(samples)
        return RolloutBatch(samples, measure_samples(self.target.features, samples), batch.proposal)

    def on_step_end(self, progress: Progress, metrics: StepMetrics) -> None:
        self.lines.append({name: value for name, value in metrics.to_json().items() if name not in NOT_OF_THE_CURVE})


@torch.no_grad()
def retold(samples: Samples, rows: Rows, model: LanguageModel) -> Samples:
    """Samples of ``model`` with other tokens, as if these ``rows`` had been drawn from it."""
    width = max(map(len, rows))
    padding = model.tokenizer.pad_token_id
    told = replace(
        samples,
        tokens=torch.tensor([row + [padding] * (width - len(row)) for row in rows]),
        mask=torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows]),
        proposal_logprob=torch.zeros(len(rows), width),
    )
    return replace(told, proposal_logprob=model.logprob(told))


def run(name: str, texts: Sequence[Rows] = ()) -> Outcome:
    """One of ``RUNS``, fitted and trained on ``texts``, those of the fit first; on what it draws if there are none."""
    config = parse_config({**COMMON, **RUNS[name]})
    plan = plan_run(config)
    roles = build_roles(config, build_base(config))
    with roles.use("base") as base:
        stated = fit_run_target(plan, base, Display(Console(file=io.StringIO())))
        drawn = stated.base_sample.samples
        used = retold(drawn, texts[0], base) if texts else drawn
    features = measure_samples(stated.target.features, used)
    target = fit_target(plan.terms, BaseSample(used, features, config.max_completion_length))
    seed = stream(config.seed, "train")
    recorder = Recorder(
        roles,
        target,
        plan.method,
        config.training,
        base_sample=target.base_sample,
        seed=seed,
        texts=texts[1:],
    )
    recorder.train()
    curve = {"fit": target.report.to_json(), "steps": recorder.lines}
    return Outcome(curve, [drawn, *recorder.drawn], [used, *recorder.used])


if __name__ == "__main__":
    outcomes = {name: run(name) for name in RUNS}
    CURVES.write_text(json.dumps({name: outcome.curve for name, outcome in outcomes.items()}, indent=1) + "\n")
    rows = {name: [samples.completion_ids for samples in outcome.drawn] for name, outcome in outcomes.items()}
    # The fit draws the same in each run.
    first, *others = rows.values()
    assert all(other[0] == first[0] for other in others)
    batches = {name: [f"\n{json.dumps(batch)}" for batch in drawn[1:]] for name, drawn in rows.items()}
    listed = ",\n".join(f"{json.dumps(name)}: [{','.join(lines)}]" for name, lines in batches.items())
    TEXTS.write_text(f'{{"fit": {json.dumps(first[0])},\n{listed}}}\n')
