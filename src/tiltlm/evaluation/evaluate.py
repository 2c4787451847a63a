"""Evaluation: estimates on fresh samples of a model, never of a proposal, each with its standard error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from tiltlm import estimation
from tiltlm.estimation import Estimate, partition_for
from tiltlm.evaluation.by_prompt import PromptEvaluation, evaluate_prompts
from tiltlm.evaluation.pooled import PooledScores
from tiltlm.evaluation.scores import Mismatch, Scores, kl_policy_base
from tiltlm.lm import LanguageModel, Prompts, Roles, Samples, SamplingSettings, next_token
from tiltlm.rollouts import LocalRollouts, RolloutsOf
from tiltlm.targets import Target
from tiltlm.targets.base_sample import BaseSample, measure_samples, measured_base_sample

# The prompts of an evaluation: those of training, held-out ones, or (any other text) those of a file.
TRAINING, HELD_OUT = "training", "held out"


@dataclass(frozen=True)
class Evaluation:
    """Estimates on samples of one model π: distances in nats, moments and TV as shares, entropy in nats per sequence.

    Estimates that need a target or a base are None or empty without one. ``texts`` are rows of ``samples.jsonl``. With
    several ``prompts``, estimates that involve the target are means over prompts, and ``per_prompt`` has the first
    hundred; ``prompts_from`` says where prompts come from. ``moments_top_p`` and ``top_p`` (diversity and KL from the
    base) are measured under top-p sampling.
    """

    samples: int
    entropy: Estimate
    distinct_1: Estimate
    distinct_1_corpus: Estimate
    self_bleu_5: Estimate
    perplexity_base: Estimate | None
    moments: dict[str, Estimate]
    target_moments: dict[str, Estimate]
    moments_top_p: dict[str, Estimate]
    kl_p_pi: Estimate | None
    kl_pi_a: Estimate | None
    tv_p_pi: Estimate | None
    log_z: Estimate | None
    ess: Estimate | None
    mismatch: Mismatch | None
    texts: tuple[dict[str, Any], ...]
    prompts: int = 1
    prompts_from: str = TRAINING
    per_prompt: tuple[PromptEvaluation, ...] = ()
    top_p: Mapping[str, Estimate] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """One JSON object; estimates are ``{"value", "se"}``, or null if they do not apply."""
        result: dict[str, Any] = {"samples": self.samples}
        for name in ("moments", "target_moments", "moments_top_p", "top_p"):
            result[name] = {key: value.to_json() for key, value in getattr(self, name).items()}
        for name in ("kl_p_pi", "kl_pi_a", "tv_p_pi", "log_z", "ess", "entropy", "perplexity_base"):
            value: Estimate | None = getattr(self, name)
            result[name] = None if value is None else value.to_json()
        for name in ("distinct_1", "distinct_1_corpus", "self_bleu_5"):
            result[name] = getattr(self, name).to_json()
        result["mismatch"] = asdict(self.mismatch) if self.mismatch else None
        result["prompts"], result["prompts_from"] = self.prompts, self.prompts_from
        result["per_prompt"] = [prompt.to_json() for prompt in self.per_prompt]
        return result


def evaluate_policy(
    roles: Roles,
    target: Target,
    n: int,
    *,
    prompts: str | Sequence[str] | Prompts | None = None,
    max_completion_length: int = 40,
    seed: int = 0,
    top_p: float | None = None,
    texts: int = 0,
    progress: Callable[[int, int], None] | None = None,
    control: BaseSample | None = None,
    prompts_from: str = TRAINING,
    rollouts: RolloutsOf = LocalRollouts,
) -> Evaluation:
    """Draw ``n`` samples each of policy and base, and measure the policy; ``texts`` of its samples are kept.

    Means over the target use both samples, weighted as drawn from the mixture of both models: P/(½π + ½a) stays below
    2P/a, so a policy that has lost part of the target cannot look close to it.

    With ``top_p`` the moments are also measured on ``n`` samples under top-p sampling, as in the paper. Prompts take
    turns; if ``n`` is no multiple of their number, ``seed`` decides which prompts have one sample more, or any.
    ``control`` are the samples of the base, if ``draw_control`` has drawn them with the same arguments.
    """
    drawing: dict[str, Any] = {"max_completion_length": max_completion_length, "progress": progress}
    control = control or draw_control(roles, target, n, prompts, seed=seed, rollouts=rollouts, **drawing)
    with torch.no_grad(), roles.use("policy") as policy:
        prompts, nucleus = control.samples.prompts, None
        samples = rollouts(policy).generate(prompts, n, seed=seed, **drawing)
        if top_p:
            settings = SamplingSettings(top_p=top_p)
            drawn = rollouts(policy).generate(prompts, n, seed=seed + 1, settings=settings, **drawing)
            nucleus = read_by_model(policy, drawn)
    scores, features = _scored(roles, target, samples, measure_samples(target.features, samples))
    control_scores, control_features = _scored(roles, target, control.samples, control.features)
    mismatch = Mismatch.of(scores)
    pooled = PooledScores.of(Scores.concatenate([scores, control_scores]), torch.cat([features, control_features]))
    names = [feature.name for feature in target.features]
    under_top_p = measure_samples(target.features, nucleus).unbind(-1) if nucleus is not None else []
    evaluation = _evaluation(
        samples,
        scores,
        pooled,
        dict(zip(names, features.unbind(-1), strict=True)),
        {name: estimation.mean(column) for name, column in zip(names, under_top_p, strict=bool(nucleus))},
        text_rows("policy", samples, target, features, scores.base_logprob, scores.policy_logprob, texts),
        mismatch,
        prompts_from,
    )
    return evaluation if nucleus is None else replace(evaluation, top_p=_under_top_p(roles, nucleus))


@torch.no_grad()
def _under_top_p(roles: Roles, samples: Samples) -> dict[str, Estimate]:
    """Diversity of samples under top-p sampling, and their KL from the base."""
    with roles.use("base") as base:
        base_logprob = base.sequence_logprob(samples)
    tokens, own = samples.completion_ids, samples.sequence_logprob.cpu()
    return {
        "kl_pi_a": estimation.mean(own - base_logprob),
        "entropy": estimation.entropy(own),
        "distinct_1": estimation.distinct_1(tokens),
        "distinct_1_corpus": estimation.distinct_n(tokens),
        "self_bleu_5": estimation.self_bleu_5(tokens),
        "perplexity_base": estimation.perplexity(base_logprob, samples.lengths.cpu()),
    }


def draw_control(
    roles: Roles,
    target: Target,
    n: int,
    prompts: str | Sequence[str] | Prompts | None = None,
    *,
    max_completion_length: int = 40,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    rollouts: RolloutsOf = LocalRollouts,
) -> BaseSample:
    """The ``n`` samples of the base, measured, that ``evaluate_policy`` uses together with those of the policy."""
    with torch.no_grad(), roles.use("base") as base:
        prompts = prompts if isinstance(prompts, Prompts) else base.encode_prompts(prompts)
        prompts = prompts.select(prompts.fair_order(n, seed))
        drawn = rollouts(base).generate(
            prompts, n, seed=seed + 2, max_completion_length=max_completion_length, progress=progress
        )
        return measured_base_sample(base, target.features, drawn, max_completion_length)


def evaluate_base(
    base_sample: BaseSample,
    target: Target,
    n: int,
    texts: int = 0,
    seed: int = 0,
    *,
    prompts_from: str = TRAINING,
) -> Evaluation:
    """The evaluation of the base, on ``n`` of the samples that the target was fitted on; no model is called.

    With several prompts ``seed`` chooses among them, all with equal probability.
    """
    prompts, prompt_index = base_sample.samples.prompts, base_sample.samples.prompt_index.cpu()
    count, places = len(prompts.texts), prompts.fair_order(n, seed).argsort()
    # The first sample of each prompt, then the second; a round that is used in part is used in fair order.
    rounds = _occurrence(prompt_index)
    rows = (rounds * count + places[prompt_index]).argsort()[:n]
    samples = base_sample.samples.select(rows.to(base_sample.samples.tokens.device))
    features = base_sample.features[rows]
    logprob = samples.sequence_logprob.cpu() + base_sample.log_ratio[rows]
    score, nothing = target.log_score(logprob, features), torch.zeros_like(logprob)
    scores = Scores(logprob, logprob, logprob, score, nothing, prompt_ids=samples.prompt_ids)
    columns = {feature.name: column for feature, column in zip(target.features, features.unbind(-1), strict=True)}
    pooled = PooledScores(scores, features, logprob)
    rows_of_texts = text_rows("base", samples, target, features, logprob, logprob, texts)
    return _evaluation(samples, scores, pooled, columns, {}, rows_of_texts, None, prompts_from)


def _occurrence(prompt_index: torch.Tensor) -> torch.Tensor:
    """How many earlier rows [N] have the same prompt."""
    order = prompt_index.argsort(stable=True)
    sizes = torch.bincount(prompt_index)
    starts = (sizes.cumsum(0) - sizes)[prompt_index[order]]
    return (torch.arange(len(order)) - starts)[order.argsort()]


def evaluate_model(
    model: LanguageModel,
    n: int,
    *,
    prompts: Prompts | None = None,
    seed: int = 0,
    prompts_from: str = TRAINING,
    rollouts: RolloutsOf = LocalRollouts,
    **sampling: Any,
) -> Evaluation:
    """Entropy and diversity of a model, without target or base."""
    with torch.no_grad():
        wanted = prompts if prompts is not None else model.encode_prompts(None)
        samples = read_by_model(model, rollouts(model).generate(wanted, n, seed=seed, **sampling))
    return _evaluation(samples, None, None, {}, {}, (), None, prompts_from)


@torch.no_grad()
def read_by_model(model: LanguageModel, samples: Samples) -> Samples:
    """The samples with log-probabilities of the model that drew them, by a forward pass unless they are exact."""
    return samples if samples.exact else replace(samples, proposal_logprob=model.logprob(samples), exact=True)


@torch.no_grad()
def score_against_base(roles: Roles, samples: Samples) -> Scores:
    """Scores of the policy's own samples; the second pass of both models gives KL(π‖a) by Rao–Blackwell."""
    order = roles.policy.chunks(samples)
    parts = []
    with roles.cast_once():
        for rows in order:
            chunk = samples.select(rows).trimmed()
            with roles.use("base") as base:
                base_read = base.read(chunk)
            scored = next_token(chunk, roles.policy.read(chunk), base_read)
            # Weights of prefixes are π/q: the policy's own samples have weight 1, however exact their sampler is.
            own = chunk if samples.exact else replace(chunk, proposal_logprob=scored.policy)
            scores = replace(Scores.of(own, scored), proposal_logprob=chunk.sequence_logprob.cpu())
            parts.append(scores.with_rescored(scored.policy))
    return Scores.concatenate([part.with_target(part.base_logprob) for part in parts], torch.cat(order).argsort())


def own_logprob(samples: Samples, scores: Scores) -> torch.Tensor:
    """log π [N] of a model's own samples: the sampler's where that is exact, else that of the scoring pass."""
    return samples.sequence_logprob if samples.exact else scores.policy_logprob


def _scored(roles: Roles, target: Target, samples: Samples, features: torch.Tensor) -> tuple[Scores, torch.Tensor]:
    """Scores with the target's log-score, and feature values [N, K]."""
    scores = score_against_base(roles, samples)
    return scores.with_target(target.log_score(scores.base_logprob, features)), features


def text_rows(
    model: str,
    samples: Samples,
    target: Target,
    features: torch.Tensor,
    base_logprob: torch.Tensor,
    policy_logprob: torch.Tensor,
    most: int,
) -> tuple[dict[str, Any], ...]:
    """Up to ``most`` texts as rows of ``samples.jsonl``, with feature values and the evidence for them."""
    count = min(most, len(samples))
    few = samples.select(torch.arange(count, device=samples.tokens.device))
    return tuple(
        {
            "model": model,
            "prompt": few.prompt_texts[i],
            "text": text,
            "features": {f.name: float(value) for f, value in zip(target.features, features[i], strict=True)},
            "base_logprob": float(base_logprob[i]),
            "policy_logprob": float(policy_logprob[i]),
            "evidence": [
                {"feature": f.name, "start": start, "end": end}
                for f in target.features
                for start, end in f.evidence(text)
            ],
        }
        for i, text in enumerate(few.texts if count else [])
    )


def _evaluation(
    samples: Samples,
    scores: Scores | None,
    pooled: PooledScores | None,
    columns: dict[str, torch.Tensor],
    moments_top_p: dict[str, Estimate],
    texts: tuple[dict[str, Any], ...],
    mismatch: Mismatch | None,
    prompts_from: str,
) -> Evaluation:
    tokens = samples.completion_ids
    model_logprob = samples.sequence_logprob if scores is None else own_logprob(samples, scores)
    common: dict[str, Any] = {
        "samples": len(samples),
        "entropy": estimation.entropy(model_logprob),
        "distinct_1": estimation.distinct_1(tokens),
        "distinct_1_corpus": estimation.distinct_n(tokens),
        "self_bleu_5": estimation.self_bleu_5(tokens),
        "moments": {name: estimation.mean(column) for name, column in columns.items()},
        "moments_top_p": moments_top_p,
        "mismatch": mismatch,
        "texts": texts,
        "prompts": len(set(samples.prompt_ids.tolist())),
        "prompts_from": prompts_from,
    }
    if scores is None or pooled is None:
        nothing: dict[str, Any] = dict.fromkeys(("perplexity_base", "kl_p_pi", "kl_pi_a", "tv_p_pi", "log_z", "ess"))
        return Evaluation(**common, **nothing, target_moments={})
    # log Z is estimated from these samples, with several prompts one for each.
    assert scores.prompt_ids is not None
    found, place = torch.unique(pooled.scores.prompt_ids, return_inverse=True)
    log_weights = pooled.scores.target_logscore - pooled.mixture_logprob
    partition = partition_for(len(found)).updated(log_weights, place)
    normalized = replace(pooled.scores, prompt_ids=place).normalized(partition)
    own = replace(scores, prompt_ids=torch.searchsorted(found, scores.prompt_ids)).normalized(partition)
    score, mixture = normalized.target_logscore, pooled.mixture_logprob
    over_target = zip(columns, pooled.features.unbind(-1), strict=True)
    return Evaluation(
        **common,
        target_moments={n: estimation.moment_under_target(column, score, mixture) for n, column in over_target},
        perplexity_base=estimation.perplexity(scores.base_logprob, samples.lengths.cpu()),
        kl_p_pi=estimation.kl_from_target(score, mixture, pooled.scores.policy_logprob),
        kl_pi_a=kl_policy_base(scores),
        tv_p_pi=estimation.tv_from_target(score, mixture, pooled.scores.policy_logprob),
        log_z=partition.log_z,
        ess=estimation.effective_sample_size(own.target_logscore - model_logprob.cpu()),
        per_prompt=evaluate_prompts(samples, scores, pooled, columns) if len(found) > 1 else (),
    )
