"""From wanted moments to a fitted target: draw from the base, measure, fit, report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tiltlm.errors import NumericalError, UnreachableTargetError, UsageError
from tiltlm.estimation import Estimate, Strata, effective_sample_size, weighted_mean
from tiltlm.features import Feature, build_feature
from tiltlm.lm import LanguageModel, Prompts
from tiltlm.targets.base_sample import BaseSample, draw_base_sample
from tiltlm.targets.moments import fit_moments, log_mean_exp, rarity_advice
from tiltlm.targets.target import Kind, Target, Term, TiltedTarget

# Below this ESS the fitted coefficients are too uncertain to use.
ENOUGH_SAMPLES = 100
# Weights that are normalized on fewer samples of a prompt are noticeably biased.
ENOUGH_OF_A_PROMPT = 16


@dataclass(frozen=True)
class TermReport:
    """One feature of a target: its mean under the base and under the fitted p, and its coefficient λ."""

    name: str
    kind: str
    goal: float | None
    base: Estimate
    achieved: Estimate
    coefficient: Estimate | None


@dataclass(frozen=True)
class FitReport:
    """A target measured on N samples of the base: log Z, ESS of its weights, KL(p‖a) in nats, and each feature.

    With several prompts all are means over prompts, with weights normalized within each.
    """

    terms: tuple[TermReport, ...]
    log_z: Estimate
    ess: Estimate
    kl_p_a: Estimate
    samples: int
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The ``target`` section of ``run.json``."""
        return {
            "features": [
                {
                    "name": term.name,
                    "kind": term.kind,
                    "goal": term.goal,
                    "base": term.base.to_json(),
                    "achieved": term.achieved.to_json(),
                    "coefficient": term.coefficient.to_json() if term.coefficient else None,
                }
                for term in self.terms
            ],
            "log_z": self.log_z.to_json(),
            "ess": self.ess.to_json(),
            "kl_p_a": self.kl_p_a.to_json(),
            "samples": self.samples,
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class FittedTarget(TiltedTarget):
    """A tilted target with the base samples of its fit and the report of the fit."""

    base_sample: BaseSample
    report: FitReport


def constrain(
    base: LanguageModel,
    constraints: Mapping[Feature | str, float] | Sequence[tuple[Feature | str, float]],
    *,
    reward: Feature | str | None = None,
    beta: float = 1.0,
    samples: int = 4096,
    prompts: str | Sequence[str] | Prompts | None = None,
    max_completion_length: int = 40,
    samples_per_prompt: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> FittedTarget:
    """The distribution with these moments that is closest to ``base`` in KL(p‖a).

    ``constraints`` gives each feature (an object, or a short form such as ``"pronouns:female"``) its moment: 1.0 for a
    binary feature is a filter, anything else an expectation. ``reward`` multiplies by exp(r/β). Draws ``samples``
    completions of the base, the prompts in turn, ``samples_per_prompt`` of each at a time. With several prompts the
    moments are means over prompts. Raises UsageError for impossible moments, UnreachableTargetError for moments that
    the samples cannot reach.
    """
    pairs = list(constraints.items() if isinstance(constraints, Mapping) else constraints)
    terms = target_terms(pairs, reward=reward, beta=beta)
    features = [term.feature for term in terms]
    drawn = draw_base_sample(
        base, features, samples, prompts, max_completion_length, seed, progress, samples_per_prompt=samples_per_prompt
    )
    return fit_target(terms, drawn)


def target_terms(
    constraints: Sequence[tuple[Feature | str, float]], *, reward: Feature | str | None = None, beta: float = 1.0
) -> list[Term]:
    """The terms of a target, not yet fitted. Raises UsageError for wrong constraints."""
    terms = [_term(feature, moment) for feature, moment in constraints]
    if reward is not None:
        if not (beta > 0 and math.isfinite(beta)):
            raise UsageError(f"beta: {beta} must be a finite number above 0; the target is a(x)·exp(r(x)/beta)")
        terms.append(Term(_feature(reward), "reward", coefficient=1 / beta))
    if not terms:
        raise UsageError("target: give at least one constraint or a reward")
    names = [term.feature.name for term in terms]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"target: two features are called '{name}'; give one of them another name")
    return terms


def fit_target(terms: Sequence[Term], base_sample: BaseSample) -> FittedTarget:
    """Fit the coefficients of the moment terms on samples of the base, given the filters and rewards."""
    values = base_sample.features
    n = values.shape[0]
    for term, column in zip(terms, values.unbind(-1), strict=True):
        if term.kind == "filter":
            _check_filter(term.feature.name, column)
    fixed = TiltedTarget(tuple(term if term.kind != "moment" else replace(term, coefficient=0.0) for term in terms))
    log_weights = fixed.log_tilt(values) + base_sample.log_ratio
    if not bool(torch.isfinite(log_weights).any()):
        listed = " and ".join(f"'{term.feature.name}'" for term in terms if term.kind == "filter")
        raise UnreachableTargetError(f"features {listed}: never held together in {n} samples. {rarity_advice(n)}")
    moments = [k for k, term in enumerate(terms) if term.kind == "moment"]
    coefficients: list[Estimate | None] = [
        Estimate(term.coefficient, 0.0) if term.kind == "reward" else None for term in terms
    ]
    fitted = list(terms)
    if moments:
        goals = [float(terms[k].goal or 0.0) for k in moments]
        names = [terms[k].feature.name for k in moments]
        fit = fit_moments(values[:, moments], log_weights, goals, names, base_sample.samples.prompt_ids)
        errors = fit.covariance.diagonal().clamp_min(0).sqrt()
        for k, value, se in zip(moments, fit.coefficients.tolist(), errors.tolist(), strict=True):
            fitted[k] = replace(terms[k], coefficient=value)
            coefficients[k] = Estimate(value, se)
    target = TiltedTarget(tuple(fitted))
    report = report_fit(target, base_sample, coefficients)
    return FittedTarget(target.terms, base_sample, report)


def report_fit(
    target: Target, base_sample: BaseSample, coefficients: Sequence[Estimate | None] | None = None
) -> FitReport:
    """The report of any target, fitted here or defined by a user, on samples of the base."""
    values = base_sample.features
    n = values.shape[0]
    log_weights = base_sample.log_weights(target)
    if bool(torch.isnan(log_weights).any() | (log_weights == math.inf).any()):
        row = int((torch.isnan(log_weights) | (log_weights == math.inf)).nonzero()[0])
        raise NumericalError(
            f"target: log_score gave log P − log a = {float(log_weights[row])} for text {row + 1} of {n}, "
            f"{base_sample.samples.texts[row]!r:.60}; return a finite number, or -inf outside of the support"
        )
    if not bool(torch.isfinite(log_weights).any()):
        raise UnreachableTargetError(f"target: none of {n} samples of the base lies in its support. {rarity_advice(n)}")
    strata = Strata.of(base_sample.samples.prompt_ids, n)
    held = strata.logsumexp(log_weights) > -math.inf
    count = int(held.sum())
    weights = strata.softmax(log_weights) if count == 1 else strata.softmax(log_weights) * (strata.count / count)
    ess = effective_sample_size(log_weights if strata.count == 1 else weights.log())
    log_z, by_prompt = _mean_log_z(strata, log_weights, weights, ess)
    # d KL = Σ_i w_i (log w_i − log Z − KL) by the delta method; rows outside the support have weight 0.
    log_tilt = torch.where(weights > 0, log_weights - base_sample.log_ratio - by_prompt[strata.index], 0.0)
    kl = float((weights * log_tilt).sum())
    around = strata.sum(weights * log_tilt)[strata.index] * count
    hit_weight = torch.where(held, 1 / (count * strata.sizes), 0.0)[strata.index]
    kl_se = float((weights * (log_tilt - around - 1) + hit_weight).square().sum().sqrt())
    terms = []
    specs = target.terms if isinstance(target, TiltedTarget) else [Term(f, "reward") for f in target.features]
    for k, term in enumerate(specs):
        column = values[:, k]
        around = strata.sum(weights * column)[strata.index] * count
        terms.append(
            TermReport(
                term.feature.name,
                term.kind,
                1.0 if term.kind == "filter" else term.goal,
                weighted_mean(column, base_sample.log_ratio.softmax(0)),
                Estimate(float((weights * column).sum()), float((weights * (column - around)).square().sum().sqrt())),
                coefficients[k] if coefficients else None,
            )
        )
    warnings = _warnings(strata, ess, count)
    return FitReport(tuple(terms), log_z, ess, Estimate(kl, kl_se), n, tuple(warnings))


def _mean_log_z(strata: Strata, log_weights: Tensor, weights: Tensor, ess: Estimate) -> tuple[Estimate, Tensor]:
    """The mean of log Z over the prompts with a weight above 0, and log Z of each prompt [C]."""
    if strata.count == 1:
        n = len(log_weights)
        log_z = Estimate(log_mean_exp(log_weights), math.sqrt(max(1 / ess.value - 1 / n, 0.0)))
        return log_z, torch.tensor([log_z.value], dtype=torch.float64)
    by_prompt = strata.logsumexp(log_weights) - strata.sizes.log()
    held = by_prompt > -math.inf
    count = int(held.sum())
    errors = (strata.sum(weights.square()) * count**2 - 1 / strata.sizes)[held].clamp_min(0)
    return Estimate(float(by_prompt[held].mean()), float(errors.sum().sqrt()) / count), by_prompt


def _warnings(strata: Strata, ess: Estimate, held: int) -> list[str]:
    """Warnings about a fit on these samples; ``held`` is the number of prompts with a positive weight."""
    found, n = [], len(strata.index)
    if ess.value < ENOUGH_SAMPLES:
        found.append(
            f"only {ess.value:.0f} of {n} samples carry the target's weight (ESS): λ and log Z are uncertain; "
            f"about {math.ceil(n * ENOUGH_SAMPLES / ess.value):,} samples would give {ENOUGH_SAMPLES}"
        )
    few = int(strata.sizes.min())
    if strata.count > 1 and few < ENOUGH_OF_A_PROMPT:
        found.append(
            f"some prompts have only {few} samples: p of a prompt is weighted on its own samples, and so few bias λ "
            f"upwards; set training.samples_per_prompt (to {ENOUGH_OF_A_PROMPT}, say), or raise target.samples"
        )
    if held < strata.count:
        found.append(
            f"{strata.count - held} of {strata.count} prompts have no sample that the target allows, and take no part "
            f"in what is averaged over prompts"
        )
    return found


def _feature(feature: Feature | str) -> Feature:
    return build_feature(feature) if isinstance(feature, str) else feature


def _term(given: Feature | str, moment: float) -> Term:
    feature = _feature(given)
    if isinstance(moment, bool) or not isinstance(moment, int | float) or not math.isfinite(moment):
        raise UsageError(f"feature '{feature.name}': moment {moment!r} is not a finite number")
    if feature.binary and not 0 <= moment <= 1:
        raise UsageError(f"feature '{feature.name}': moment {moment:g} is outside of [0, 1], its share of the texts")
    if feature.binary and moment == 0:
        raise UsageError(
            f"feature '{feature.name}': for moment 0 ask for its opposite with moment 1.0 (not: {feature.name})"
        )
    kind: Kind = "filter" if feature.binary and moment == 1 else "moment"
    return Term(feature, kind, float(moment))


def _check_filter(name: str, values: Tensor) -> None:
    n, hits = len(values), int((values > 0).sum())
    if hits == 0:
        raise UnreachableTargetError(f"feature '{name}': it never held in {n} samples of the base. {rarity_advice(n)}")
    if hits == n:
        raise UnreachableTargetError(
            f"feature '{name}': it held in all {n} samples of the base, so as a filter it changes nothing. Remove it."
        )
