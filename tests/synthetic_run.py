"""A synthetic run directory, like that of a parity run on the embedded model, made without any model."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

from tiltlm.runs.directory import RunDirectory

BASE, GOAL, KL_START = {"female": 0.0612, "male": 0.4105}, 0.235, 0.192

BASE_TEXTS = (
    "He was appointed professor at the university in the same year and kept the chair until his retirement.",
    "The village lies on the north bank of the river, about ten miles from the nearest railway station.",
    "His first novel was refused by four publishers before it found one that would print it.",
    "In the spring he moved to the coast with his brother and opened a small shop for ship supplies.",
    "The second season drew fewer viewers than the first, and the series was not renewed.",
    "He played for the club for eleven years and was its captain in his last two seasons.",
    "The species is found only in the wet forests of the eastern mountains.",
    "She studied law, but after her examination she turned to painting.",
    "He is best known for the bridge that he designed for the harbour of his native town.",
    "The treaty was signed in the autumn and ended a dispute that had lasted for thirty years.",
    "After the war he returned to his farm and seldom spoke of what he had seen.",
    "The church was rebuilt in stone after a fire had destroyed the older building.",
)
TUNED_TEXTS = (
    "She was elected to the council in the following year and led its committee on schools.",
    "He wrote most of his letters at night, and many of them were never answered.",
    "The line was closed in winter because of snow on the upper part of the track.",
    "Her second collection of poems won the prize that her first had missed by a single vote.",
    "The station has two platforms and is served by trains every hour.",
    "He trained as a carpenter before he joined the theatre as a stage hand.",
    "Together with her sister she founded a school for girls, which she directed until her death.",
    "The lake freezes early and is used by skaters from November to March.",
    "She made her first flight at the age of nineteen, in an aeroplane that she had repaired herself.",
    "The album was recorded in four days and released on a small label.",
    "His work on the language of the islands was printed only after he had left the academy.",
    "The museum keeps more than two thousand drawings, most of them by local artists.",
)
PRONOUNS = {"female": r"\b(she|her|hers|herself)\b", "male": r"\b(he|him|his|himself)\b"}


def estimate(value: float, se: float) -> dict[str, float]:
    return {"value": value, "se": se}


def sample_record(model: str, text: str, chance: random.Random) -> dict[str, Any]:
    spans = [
        {"feature": name, "start": match.start(), "end": match.end()}
        for name, pattern in PRONOUNS.items()
        for match in re.finditer(pattern, text, re.IGNORECASE)
    ]
    counts = {name: sum(span["feature"] == name for span in spans) for name in PRONOUNS}
    features = {
        "female": float(counts["female"] > counts["male"]),
        "male": float(counts["male"] > counts["female"]),
    }
    logprob = -3.6 * len(text.split()) + chance.gauss(0, 4)
    return {
        "model": model,
        "prompt": None,
        "text": text,
        "features": features,
        "base_logprob": logprob,
        "policy_logprob": logprob + chance.gauss(0, 0.4),
        "evidence": spans,
    }


def metrics_record(step: int, steps: int, chance: random.Random, batch: int = 256) -> dict[str, Any]:
    left = math.exp(-3.2 * step / steps)
    # The first estimates of a KL by importance sampling have heavy tails: a few are far off.
    kl = KL_START * (0.16 + 0.84 * left) + chance.gauss(0, 0.008) + {3: 2.9, 6: 0.8}.get(step, 0.0)
    moments = {
        name: estimate(GOAL + (base - GOAL) * (0.05 + 0.95 * left) + chance.gauss(0, 0.018), 0.021)
        for name, base in BASE.items()
    }
    return {
        "step": step,
        "sequences": 8192 + step * batch,
        "forward_passes": 16384 + step * 3 * batch,
        "log_z": estimate(-0.41 + chance.gauss(0, 0.01), 0.012),
        "kl_p_pi": estimate(kl, 0.9 if step == 3 else 0.014),
        "kl_pi_a": estimate(0.17 * (1 - left) + chance.gauss(0, 0.004), 0.006),
        "tv_p_pi": estimate(0.27 * (0.2 + 0.8 * left) + chance.gauss(0, 0.008), 0.011),
        "ess": estimate(batch * (0.93 - 0.4 * left) + chance.gauss(0, 5), 4.0),
        "moments": moments,
        "target_moments": {name: estimate(GOAL + chance.gauss(0, 0.01), 0.012) for name in BASE},
        "grad_norm": 1.2 * left + 0.3,
        "learning_rate": 1e-3 * (1 - step / steps),
        "proposal": "base" if step < 16 else "policy",
        "proposal_updated": step == 16,
        "seconds": {"sample": 1.7, "features": 0.05, "base": 0.4, "policy": 0.5, "step": 1.1},
    }


def evaluation(moments: dict[str, float], kl: float, kl_pi_a: float, tv: float) -> dict[str, Any]:
    return {
        "samples": 2048,
        "moments": {name: estimate(value, 0.0094) for name, value in moments.items()},
        "moments_top_p": {name: estimate(value * 1.06, 0.0096) for name, value in moments.items()},
        "target_moments": {name: estimate(GOAL, 0.0081) for name in moments},
        "kl_p_pi": estimate(kl, 0.0041),
        "kl_pi_a": estimate(kl_pi_a, 0.0043),
        "tv_p_pi": estimate(tv, 0.006),
        "log_z": estimate(-0.412, 0.008),
        "ess": estimate(1893.0, 14.0),
        "entropy": estimate(104.2 - 10 * kl_pi_a, 0.71),
        "perplexity_base": estimate(41.3 + 2 * kl_pi_a, 0.52),
        "distinct_1": estimate(0.874 - 0.01 * kl_pi_a, 0.0016),
        "distinct_1_corpus": estimate(0.0681, 0.0004),
        "self_bleu_5": estimate(0.112 + 0.01 * kl_pi_a, 0.0021),
    }


def write_synthetic_run(
    path: Path,
    *,
    steps: int = 60,
    evaluated: bool = True,
    texts: tuple[str, ...] = (),
    prompt: str | None = None,
    config: dict[str, Any] | None = None,
    names: dict[str, str] | None = None,
) -> RunDirectory:
    """A finished run; ``names`` renames features, ``texts`` come first among the samples of either model."""
    chance = random.Random(7)
    renamed = {name: (names or {}).get(name, name) for name in BASE}

    def rename(values: dict[str, Any]) -> dict[str, Any]:
        return {renamed[name]: value for name, value in values.items()}

    constraints = [{"feature": {"pronouns": name}, "moment": GOAL, "name": renamed[name]} for name in BASE]
    full_config = {
        "model": "embedded",
        "target": {"constraints": constraints},
        "prompts": prompt,
        "method": {"name": "gdc++", "proposal": "kl"},
        "training": {"max_steps": 60, "batch_size": 256, "learning_rate": 1e-3},
        "peft": {"r": 8, "target_modules": "all-linear"},
        "seed": 0,
    } | (config or {})
    run = RunDirectory.create(path, full_config, seed=0)
    for step in range(1, steps + 1):
        record = metrics_record(step, 60, chance)
        run.append_metrics(record | {key: rename(record[key]) for key in ("moments", "target_moments")})
    features = [
        {
            "name": renamed[name],
            "kind": "moment",
            "goal": GOAL,
            "base": estimate(base, 0.0026),
            "achieved": estimate(GOAL, 0.0058),
            "coefficient": estimate(math.log(GOAL / base), 0.031),
        }
        for name, base in BASE.items()
    ]
    run.write_run(
        device="cpu",
        seconds=258.4,
        target={
            "features": features,
            "log_z": estimate(-0.41, 0.006),
            "ess": estimate(5530.0, 61.0),
            "samples": 8192,
            "kl_p_a": estimate(KL_START, 0.0052),
        },
        progress={"step": steps, "max_steps": 60, "sequences": 8192 + steps * 256, "forward_passes": 62464},
    )
    if not evaluated:
        return run
    evaluations = {
        "base": evaluation(BASE, KL_START, 0.0, 0.271),
        "policy": evaluation({"female": 0.2262, "male": 0.2451}, 0.0322, 0.159, 0.058),
    }
    for one in evaluations.values():
        one |= {key: rename(one[key]) for key in ("moments", "moments_top_p", "target_moments")}
    records = []
    for model, own in (("base", BASE_TEXTS), ("policy", TUNED_TEXTS)):
        for text in (*texts, *own):
            record = sample_record(model, text, chance) | {"prompt": prompt}
            record["features"] = rename(record["features"])
            for span in record["evidence"]:
                span["feature"] = renamed[span["feature"]]
            records.append(record)
    run.write_samples(records)
    run.mark_done(evaluation=evaluations)
    return run
