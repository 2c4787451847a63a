"""The frozen reference: one weighted sample of p for each task, on which KL(p‖π) of all its runs is taken."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltlm.build import build_base, encode_prompts, read_prompts
from tiltlm.config import RunConfig
from tiltlm.errors import CheckpointError, UsageError
from tiltlm.estimation import (
    Estimate,
    Strata,
    effective_sample_size,
    pareto_k,
    pareto_k_threshold,
    weighted_mean,
)
from tiltlm.job import Stated, state_target, stream
from tiltlm.lm import LanguageModel, Law, Roles, Samples
from tiltlm.lm.fingerprint import fingerprint
from tiltlm.runs import storage
from tiltlm.runs.display import Display
from tiltlm.sampling import Draws, Proposal, build_proposal, is_guidable
from tiltlm.study.file import ReferenceSection

# With fewer effective samples than this share of those drawn from the base, the guided base is tried as well.
ENOUGH_SHARE = 0.25
ROWS_AT_ONCE = 2048
TENSORS = ("tokens", "mask", "proposal_logprob", "prompt_index")
SAMPLE, RECORD = "sample.pt", "reference.json"


@dataclass(frozen=True)
class Reference:
    """N samples with P > 0 of ``drawn``, their weights [N] (sum 1) under p, and log p and log a of each [N], float64.

    With several prompts p(x|c) is normalized prompt by prompt, and every prompt weighs as much.
    """

    samples: Samples
    weights: Tensor
    target_logprob: Tensor
    base_logprob: Tensor
    drawn: int

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def kl_p_a(self) -> Estimate:
        """KL(p‖a)."""
        return self.kl(self.base_logprob)

    def kl(self, logprob: Tensor) -> Estimate:
        """KL(p‖π) = E_p[log p] − E_p[log π] from log π [M] of the first M samples, with the delta method's error.

        With M < N only E_p[log a − log π] rests on these M; KL(p‖a), which has all of the weights' spread, on all N.
        """
        m = len(logprob)
        if m < len(self):
            weights = self.weights[:m] / self.weights[:m].sum()
            gap, whole = weighted_mean(self.base_logprob[:m] - logprob, weights), self.kl_p_a
            return Estimate(whole.value + gap.value, math.hypot(whole.se, gap.se))
        gaps = self.target_logprob - logprob
        value = float((self.weights * gaps).sum())
        # Influence of a draw with relative weight v on Σ w (log P − log π) − log Z; with P = 0 it is 1, from log Z.
        relative = self.drawn * self.weights
        influence = relative * (gaps - value - 1) + 1
        spread = float(influence.square().sum()) + self.drawn - len(self)
        return Estimate(value, math.sqrt(spread) / self.drawn)

    @torch.no_grad()
    def kl_of(self, policy: LanguageModel, most: int | None = None) -> Estimate:
        """KL(p‖π) of a model, on the first ``most`` samples."""
        few = self.samples if most is None or most >= len(self) else self.samples.select(torch.arange(most))
        return self.kl(policy.logprob(few, law=Law()).double().sum(-1).cpu())


def reference_key(config: RunConfig, settings: ReferenceSection) -> str:
    """What a reference depends on, as a hash: the base, the target with its fit, and how the sample is drawn."""
    stated = config.to_json()
    parts = {
        name: stated[name] for name in ("model", "revision", "dtype", "prompts", "target", "max_completion_length")
    }
    parts |= {"samples_per_prompt": config.training.samples_per_prompt, "reference": settings.model_dump(mode="json")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def has_reference(folder: Path, key: str) -> bool:
    """Whether the reference is there. Raises UsageError where it was drawn for other settings."""
    if not (folder / RECORD).exists():
        return False
    if storage.read_object(folder / RECORD)["key"] != key:
        raise UsageError(
            f"{folder}: this reference was drawn for another base, target or reference section than the study now "
            f"states; delete it together with the runs of its task, or choose another output_dir"
        )
    return True


def make_reference(config: RunConfig, settings: ReferenceSection, folder: Path, display: Display) -> None:
    """Fit the task's target as all its runs do, draw the sample of p, and keep it; ``reference.json`` comes last.

    Raises UnreachableTargetError for a target that the base's samples do not reach.
    """
    base = build_base(config).freeze()
    stated = state_target(config, base, display)
    source, reason = settings.proposal or "base", "asked for"
    draws, base_logprob = _drawn(source, base, stated, config, settings, display)
    if settings.proposal is None:
        reason = "the base reaches the target often enough"
        if _size(draws) < ENOUGH_SHARE * settings.samples and is_guidable(stated.target):
            guided = _drawn("guided", base, stated, config, settings, display)
            reason = f"effective samples: {_size(draws):.0f} of the base, {_size(guided[0]):.0f} of the guided base"
            if _size(guided[0]) > _size(draws):
                source, (draws, base_logprob) = "guided", guided
        elif _size(draws) < ENOUGH_SHARE * settings.samples:
            reason = f"effective samples: {_size(draws):.0f}; no feature can be read off a prefix, so there is no guide"
    reference = _weighted(draws, base_logprob)
    _save(folder, reference, config.max_completion_length)
    hits = draws.log_weights[draws.log_weights > -math.inf]
    storage.write_object(
        folder / RECORD,
        {
            "key": reference_key(config, settings),
            "proposal": source,
            "reason": reason,
            "samples": len(draws),
            "hits": len(hits),
            "ess": _size(draws),
            "pareto_k": pareto_k(draws.log_weights),
            "pareto_k_threshold": pareto_k_threshold(len(hits)),
            "kl_p_a": reference.kl_p_a,
            "base_fingerprint": fingerprint(base),
            "target": stated.report.to_json(),
        },
    )


def load_reference(folder: Path, model: LanguageModel, config: RunConfig) -> Reference:
    """What ``make_reference`` kept, for a model with the same tokenizer. Raises CheckpointError."""
    try:
        state = torch.load(folder / SAMPLE, map_location=model.device, weights_only=True)
        prompts = encode_prompts(model, read_prompts(config).training)
        samples = Samples(
            **{name: state[name] for name in TENSORS},
            prompts=prompts.select(state["prompts"]),
            law=Law(),
            tokenizer=model.tokenizer,
        )
        weights, target, base = (state[name].cpu() for name in ("weights", "target_logprob", "base_logprob"))
        return Reference(samples, weights, target, base, state["drawn"])
    except (OSError, KeyError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{folder / SAMPLE} is damaged ({error!r}); delete {folder} to have it drawn anew"
        ) from error


def _drawn(
    source: str,
    base: LanguageModel,
    stated: Stated,
    config: RunConfig,
    settings: ReferenceSection,
    display: Display,
) -> tuple[Draws, Tensor]:
    """The draws of one proposal, and log a of each [N]."""
    roles, prompts = Roles(base, base=base), stated.base_sample.samples.prompts
    proposal: Proposal = build_proposal(
        source,
        roles,
        stated.target,
        policy=False,
        base_sample=stated.base_sample,
        prompts=prompts,
        max_completion_length=config.max_completion_length,
    )
    generator = torch.Generator(base.device).manual_seed(stream(settings.seed, "reference"))
    parts = []
    with display.counting(f"drawing the reference from the {'guided base' if source == 'guided' else 'base'}") as told:
        for start in range(0, settings.samples, ROWS_AT_ONCE):
            n = min(ROWS_AT_ONCE, settings.samples - start)
            places = [(start + i) % len(prompts) for i in range(min(n, len(prompts)))]
            parts.append(proposal.draw(n, places, generator))
            told(start + n, settings.samples)
    draws = Draws.concatenate(parts)
    if source == "base":
        return draws, draws.samples.sequence_logprob.cpu()
    with torch.no_grad():
        return draws, base.logprob(draws.samples, law=Law()).double().sum(-1).cpu()


def _size(draws: Draws) -> float:
    strata = Strata.of(draws.samples.prompt_ids, len(draws))
    return effective_sample_size(strata.softmax(draws.log_weights).log()).value


def _weighted(draws: Draws, base_logprob: Tensor) -> Reference:
    strata = Strata.of(draws.samples.prompt_ids, len(draws))
    held = draws.log_weights > -math.inf
    log_z = strata.logsumexp(draws.log_weights) - strata.sizes.log()
    weights = strata.softmax(draws.log_weights)[held]
    target_logprob = draws.log_weights + draws.samples.sequence_logprob.cpu() - log_z[strata.index]
    rows = held.nonzero().squeeze(-1).to(draws.samples.tokens.device)
    samples = draws.samples.select(rows)
    return Reference(samples, weights / weights.sum(), target_logprob[held], base_logprob[held], len(draws))


def _save(folder: Path, reference: Reference, length: int) -> None:
    samples = reference.samples
    state: dict[str, Any] = {
        **{name: getattr(samples, name).cpu() for name in TENSORS},
        "prompts": list(samples.prompts.ids),
        "weights": reference.weights,
        "target_logprob": reference.target_logprob,
        "base_logprob": reference.base_logprob,
        "drawn": reference.drawn,
        "max_completion_length": length,
    }
    partial = folder / f"{SAMPLE}.partial"
    with storage.writing(folder / SAMPLE):
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(state, partial)
        os.replace(partial, folder / SAMPLE)
