"""The frozen reference: one weighted sample of p per task, on which KL(p‖π) of all its runs is measured."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tiltlm.app.build import build_base
from tiltlm.app.display import Display
from tiltlm.app.fit import RunTarget, fit_run_target, stream
from tiltlm.app.plan import plan_run
from tiltlm.app.prompts import encode_prompts, read_prompts
from tiltlm.config.run import RunConfig
from tiltlm.config.study import ReferenceSection
from tiltlm.errors import CheckpointError, UsageError
from tiltlm.estimation import (
    Estimate,
    Strata,
    effective_sample_size,
    log_importance_weights,
    pareto_k,
    pareto_k_threshold,
    weighted_mean,
)
from tiltlm.guides import guide_toward
from tiltlm.lm import Guide, LanguageModel, Samples, SamplingSettings
from tiltlm.rollouts import LocalRollouts
from tiltlm.runs import storage
from tiltlm.targets import BaseSample, measure_samples
from tiltlm.training.checkpoint import save_base_sample

# With fewer effective samples than this share of those drawn from the base, the guided base is tried as well.
ENOUGH_SHARE = 0.25
ROWS_PER_DRAW = 2048
TENSORS = ("tokens", "mask", "proposal_logprob", "prompt_index")
SAMPLE, RECORD = "sample.pt", "reference.json"


@dataclass(frozen=True)
class Reference:
    """The N of ``drawn`` samples with P > 0: weights [N] (sum 1) under p, and log p and log a of each [N], float64.

    With several prompts p(x|c) is normalized within each prompt, and all prompts have equal weight.
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

        With M < N only E_p[log a − log π] uses these M; KL(p‖a), which has the variance of the weights, uses all N.
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
        variance = float(influence.square().sum()) + self.drawn - len(self)
        return Estimate(value, math.sqrt(variance) / self.drawn)

    @torch.no_grad()
    def kl_of(self, policy: LanguageModel, most: int | None = None) -> Estimate:
        """KL(p‖π) of a model, on the first ``most`` samples."""
        few = self.samples if most is None or most >= len(self) else self.samples.select(torch.arange(most))
        return self.kl(policy.sequence_logprob(few))


def reference_key(config: RunConfig, settings: ReferenceSection) -> str:
    """A hash of everything a reference depends on: the base, the target with its fit, the settings of the sample."""
    record = config.to_json()
    parts = {
        name: record[name] for name in ("model", "revision", "dtype", "prompts", "target", "max_completion_length")
    }
    parts |= {
        "samples_per_prompt": config.training.samples_per_prompt,
        "reference": settings.model_dump(mode="json", exclude={"scored"}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def has_reference(folder: Path, key: str) -> bool:
    """Whether the reference exists. Raises UsageError if it was drawn for other settings."""
    if not (folder / RECORD).exists():
        return False
    if storage.read_object(folder / RECORD)["key"] != key:
        raise UsageError(
            f"{folder}: this reference was drawn for another base, target or reference section than the study has now; "
            f"delete it together with the runs of its task, or choose another output_dir"
        )
    return (folder / SAMPLE).exists()  # The sample is missing if only the results were copied; it is drawn again.


def make_reference(config: RunConfig, settings: ReferenceSection, folder: Path, display: Display) -> None:
    """Fit the task's target as all its runs do, draw the sample of p and save it; ``reference.json`` is written last.

    Raises UnreachableTargetError if the base's samples cannot reach the target.
    """
    base = build_base(config).freeze()
    fitted = fit_run_target(plan_run(config), base, display)
    save_base_sample(folder, fitted.base_sample)
    drawn, reason = _best(base, fitted, config, settings, display)
    reference = _weighted(drawn)
    _save(folder, reference)
    hits = len(reference)
    storage.write_object(
        folder / RECORD,
        {
            "key": reference_key(config, settings),
            "proposal": drawn.source,
            "reason": reason,
            "samples": reference.drawn,
            "hits": hits,
            "ess": drawn.size,
            "pareto_k": pareto_k(drawn.log_weights),
            "pareto_k_threshold": pareto_k_threshold(hits),
            "kl_p_a": reference.kl_p_a,
            "base_fingerprint": base.fingerprint(),
            "target": fitted.report.to_json(),
        },
    )


def load_reference(folder: Path, model: LanguageModel, config: RunConfig) -> Reference:
    """The sample saved by ``make_reference``, for a model with the same tokenizer. Raises CheckpointError."""
    try:
        state = torch.load(folder / SAMPLE, map_location=model.device, weights_only=True)
        prompts = encode_prompts(model, read_prompts(config).training)
        samples = Samples(
            **{name: state[name] for name in TENSORS},
            prompts=prompts.select(state["prompts"]),
            settings=SamplingSettings(),
            tokenizer=model.tokenizer,
        )
        weights, target, base = (state[name].cpu() for name in ("weights", "target_logprob", "base_logprob"))
        return Reference(samples, weights, target, base, state["drawn"])
    except (OSError, KeyError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{folder / SAMPLE} is damaged ({error!r}); delete {folder} to draw it again") from error


@dataclass(frozen=True)
class WeightedDraws:
    """N samples of the proposal ``source``, with features [N, K], and log P − log q, log P and log a of each [N]."""

    source: str
    samples: Samples
    features: Tensor
    log_weights: Tensor
    target_logscore: Tensor
    base_logprob: Tensor

    @property
    def size(self) -> float:
        """The effective sample size; 0 if no sample is in the target's support."""
        if not bool(self.log_weights.isfinite().any()):
            return 0.0
        strata = Strata.of(self.samples.prompt_ids, len(self.log_weights))
        return effective_sample_size(strata.softmax(self.log_weights).log()).value


def _best(
    base: LanguageModel, fitted: RunTarget, config: RunConfig, settings: ReferenceSection, display: Display
) -> tuple[WeightedDraws, str]:
    """The draws with the larger ESS, and the reason."""
    generator = torch.Generator(base.device).manual_seed(stream(settings.seed, "reference"))
    plain = _draw(None, base, fitted, config, settings, generator, display)
    if settings.proposal == "base":
        return plain, "asked for"
    if settings.proposal is None and plain.size >= ENOUGH_SHARE * settings.samples:
        return plain, "the effective sample size of the base is large enough"
    # The guide is estimated from the sample with more effective samples: this one, or that of the fit if the fit drew
    # rare texts. Draws of the guide are independent of both.
    plain_sample = BaseSample(plain.samples, plain.features, config.max_completion_length)
    guide = guide_toward(
        base, fitted.target, fitted.base_sample if fitted.report.ess.value > plain.size else plain_sample
    )
    mixed = _draw(guide, base, fitted, config, settings, generator, display)
    if settings.proposal == "guided":
        return mixed, "asked for"
    reason = f"effective samples: {plain.size:.0f} base, {mixed.size:.0f} guided"
    return max(plain, mixed, key=lambda one: one.size), reason


@torch.no_grad()
def _draw(
    guide: Guide | None,
    base: LanguageModel,
    fitted: RunTarget,
    config: RunConfig,
    settings: ReferenceSection,
    generator: torch.Generator,
    display: Display,
) -> WeightedDraws:
    """Samples of the base or, with a guide, half of the base and half of the guided base, weighted by their mixture.

    The mixture bounds the weights by 2 P/a, however bad the guide is (Owen & Zhou 2000).
    """
    prompts = fitted.base_sample.samples.prompts
    source, parts, done = "guided" if guide else "base", list[Samples](), 0
    guides = [None] if guide is None else [None, base.placed(guide)]
    with display.counting(f"drawing the reference: {source}") as show_progress:
        while done < settings.samples:
            n = min(ROWS_PER_DRAW, settings.samples - done)
            for place, of in enumerate(guides):
                share, first = (n + place) // len(guides), done // len(guides)
                places = [(first + i) % len(prompts) for i in range(min(share, len(prompts)))]
                length = config.max_completion_length
                part = LocalRollouts(base).generate(
                    prompts.select(places), share, generator=generator, max_completion_length=length, guide=of
                )
                index = torch.tensor(places, device=part.tokens.device)[part.prompt_index]
                parts.append(replace(part, prompts=prompts, prompt_index=index, guide=None))
            done += n
            show_progress(done, settings.samples)
        samples = Samples.concatenate(parts)
        base_logprob = base.sequence_logprob(samples)
        proposal = base_logprob
        if guide is not None:
            guided = base.logprob(replace(samples, guide=guide)).double().sum(-1).cpu()
            proposal = torch.logaddexp(base_logprob, guided) - math.log(2)
        features = measure_samples(fitted.target.features, samples)
    score = fitted.target.log_score(base_logprob, features)
    return WeightedDraws(source, samples, features, log_importance_weights(score, proposal), score, base_logprob)


def _weighted(drawn: WeightedDraws) -> Reference:
    """The samples with P > 0 in random order, so that the first M are a random subset."""
    n = len(drawn.log_weights)
    strata = Strata.of(drawn.samples.prompt_ids, n)
    log_z = strata.logsumexp(drawn.log_weights) - strata.sizes.log()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    rows = order[drawn.log_weights[order] > -math.inf]
    weights = strata.softmax(drawn.log_weights)[rows]
    return Reference(
        drawn.samples.select(rows.to(drawn.samples.tokens.device)),
        weights / weights.sum(),
        (drawn.target_logscore - log_z[strata.index])[rows],
        drawn.base_logprob[rows],
        n,
    )


def _save(folder: Path, reference: Reference) -> None:
    samples = reference.samples
    state: dict[str, Any] = {
        **{name: getattr(samples, name).cpu() for name in TENSORS},
        "prompts": list(samples.prompts.ids),
        "weights": reference.weights,
        "target_logprob": reference.target_logprob,
        "base_logprob": reference.base_logprob,
        "drawn": reference.drawn,
    }
    partial = folder / f"{SAMPLE}.partial"
    with storage.writing(folder / SAMPLE):
        torch.save(state, partial)
        os.replace(partial, folder / SAMPLE)
