"""Several prompts on an enumerable model: fit, Z of each prompt, gradients, metrics and runs against the truth."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from enumerable import tiny_model
from tiltlm.config.run import MethodConfig
from tiltlm.config.training import TrainingArguments
from tiltlm.errors import UnreachableTargetError
from tiltlm.estimation import Estimate, Partition, PromptPartition
from tiltlm.evaluation.evaluate import Evaluation, evaluate_base, evaluate_policy
from tiltlm.exact import ExactConditional, enumerate_completions, exact_conditional, exact_kl
from tiltlm.features import Feature, build_feature, callable_feature, length
from tiltlm.lm import LanguageModel, Prompts, Roles, Samples, SamplingSettings
from tiltlm.objectives import BUILT_IN
from tiltlm.rollouts.proposal import Proposal
from tiltlm.targets import (
    BaseSample,
    Term,
    TiltedTarget,
    draw_base_sample,
    fit_moments,
    fit_target,
    measure_samples,
    report_fit,
)
from tiltlm.training.method import Method
from tiltlm.training.metrics import step_metrics
from tiltlm.training.proposal_rules import proposal_rule
from tiltlm.training.rollout_batch import RolloutBatch
from tiltlm.training.trainer import Trainer
from tiny_world import as_if_uniform, flat, gradient, near

LENGTH = 4
# Ragged, so that they are padded, with a pad that is the EOS too; the words make the prompts differ.
TEXTS = ["a b", "b", "d d d", "b a b a"]
WORDS = ["b", "a", "d", "b"]


def holds_word(completions: list[str], word: list[str], **columns: Any) -> list[float]:
    """1 where the completion holds the word that stands in the prompt's row."""
    return [float(w in text.split()) for w, text in zip(word, completions, strict=True)]


def word_feature() -> Feature:
    return callable_feature(holds_word, name="its word", binary=True)


@dataclass(frozen=True)
class Conditional:
    """The base, a target with a filter, a tilt of a feature that reads a column, and a reward; and the whole truth."""

    base: LanguageModel
    prompts: Prompts
    target: TiltedTarget
    samples: Samples
    truth: ExactConditional


@cache
def conditional(architecture: str = "gpt2") -> Conditional:
    base = tiny_model(architecture, "pad_is_eos")
    prompts = base.encode_prompts(TEXTS, {"word": WORDS})
    terms = (
        Term(build_feature({"not": {"contains": "c"}}).renamed("no c"), "filter", 1.0),
        Term(word_feature(), "moment", 0.6, 1.5),
        Term(length("words").renamed("words"), "reward", coefficient=0.4),
    )
    target = TiltedTarget(terms)
    samples = enumerate_completions(base, prompts, max_completion_length=LENGTH)
    return Conditional(base, prompts, target, samples, exact_conditional(base, target, samples))


@pytest.fixture(scope="module")
def world() -> Conditional:
    return conditional()


def drawn(world: Conditional, n: int, seed: int = 0, each: int = 1) -> BaseSample:
    return draw_base_sample(world.base, world.target.features, n, world.prompts, LENGTH, seed, samples_per_prompt=each)


def trainer_of(
    world: Conditional, *, policy: LanguageModel | None = None, method: str = "gdc++", fit: int = 800, **settings: Any
) -> Trainer:
    arguments: dict[str, Any] = {"batch_size": 80, "learning_rate": 0.002, "reuse_fit_samples": False, **settings}
    rule = arguments.pop("rule", "on_policy")
    folder = arguments.pop("folder", None)
    each = arguments.get("samples_per_prompt") or 1
    trainer = Trainer(
        Roles(policy or world.base.copy(), base=world.base),
        world.target,
        Method(BUILT_IN[method](), proposal_rule(rule, 2)),
        TrainingArguments(**arguments),
        base_sample=drawn(world, fit, each=each),
        seed=5,
    )
    trainer.checkpoint_dir = folder
    return trainer


def true_gradient(world: Conditional, policy: LanguageModel, weights: Tensor | None = None) -> dict[str, Tensor]:
    """∇ Σ_c weight_c KL(p_c‖π_c) by differentiating the exact divergences; the weights are 1/C if none are given."""
    logprob = policy.logprob(world.samples, settings=SamplingSettings()).sum(-1).reshape(len(TEXTS), -1)
    p = torch.stack([truth.logprob for truth in world.truth.prompts])
    kl = (p.exp() * torch.where(p.isfinite(), p - logprob, 0.0)).sum(-1)
    weights = torch.full((len(TEXTS),), 1 / len(TEXTS)) if weights is None else weights
    named = {name: parameter for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad((weights.to(kl) * kl).sum(), list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def every_completion(world: Conditional) -> RolloutBatch:
    """Each completion of each prompt once, as if drawn from the uniform law: a mean over rows is an expectation."""
    features = torch.cat([truth.features for truth in world.truth.prompts])
    return RolloutBatch(as_if_uniform(world.samples), features, Proposal.parse("step 3"))


def test_the_prompts_differ_are_ragged_and_their_truths_are_those_of_each_alone(world: Conditional) -> None:
    assert world.prompts.ragged
    assert world.base.pad_id in world.base.eos_ids
    log_z = world.truth.log_z
    assert log_z.max() - log_z.min() > 0.3
    for c, (text, word) in enumerate(zip(TEXTS, WORDS, strict=True)):
        alone = world.base.encode_prompts([text], {"word": [word]})
        listed = enumerate_completions(world.base, alone, max_completion_length=LENGTH)
        truth = exact_conditional(world.base, world.target, listed)
        torch.testing.assert_close(truth.log_z[0], log_z[c], rtol=0, atol=1e-6)
        torch.testing.assert_close(truth.moments, world.truth.prompts[c].moments, rtol=0, atol=1e-6)
        assert float(world.truth.prompts[c].base_logprob.exp().sum()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", ["gdc++", "gdc", "dpg"])
def test_with_z_of_each_prompt_the_gradient_is_that_of_the_mean_kl(world: Conditional, name: str) -> None:
    trainer = trainer_of(world, policy=near(world.base), method=name, rule="kl")
    batch = every_completion(world)
    trainer.accumulate(batch, world.truth.log_z[batch.samples.prompt_ids])
    truth = flat(true_gradient(world, trainer.roles.policy), trainer)
    found = gradient(trainer)
    assert truth.norm() > 0.1
    assert float((found - truth).abs().max()) < 1e-9


def test_one_z_for_all_weighs_prompts_by_their_z(world: Conditional) -> None:
    trainer = trainer_of(world, policy=near(world.base), rule="kl")
    pooled = float(world.truth.log_z.logsumexp(0)) - math.log(len(TEXTS))
    trainer.accumulate(every_completion(world), pooled)
    shares = (world.truth.log_z - pooled).exp() / len(TEXTS)
    found, truth = gradient(trainer), flat(true_gradient(world, trainer.roles.policy, shares), trainer)
    assert float((found - truth).abs().max()) < 1e-9
    assert float((truth - flat(true_gradient(world, trainer.roles.policy), trainer)).norm()) > 0.05


def test_on_sampled_batches_the_mean_gradient_is_the_same(world: Conditional) -> None:
    trainer = trainer_of(world, policy=near(world.base, 0.02), batch_size=1500, fit=400)
    truth = flat(true_gradient(world, trainer.roles.policy), trainer)
    total = torch.zeros_like(truth)
    for _ in range(6):
        batch = trainer.draw()
        trainer.accumulate(batch, world.truth.log_z[batch.samples.prompt_ids])
        total += gradient(trainer) / 6
    cosine = float(total @ truth / total.norm() / truth.norm())
    assert cosine > 0.97
    assert float((total - truth).norm()) < 0.25 * float(truth.norm())


def test_the_fit_on_every_completion_has_the_wanted_mean_over_prompts(world: Conditional) -> None:
    """Every completion with its probability: the fit's Newton against a scalar search on the exact dual."""
    features = torch.cat([truth.features for truth in world.truth.prompts])
    base = torch.cat([truth.base_logprob for truth in world.truth.prompts])
    prompts = world.samples.prompt_ids
    fit = fit_moments(features[:, 1:2], base, [0.6], ["its word"], prompts)

    def mean_under(coefficient: float) -> float:
        tilted = [
            ((truth.base_logprob + coefficient * truth.features[:, 1]).softmax(0) @ truth.features[:, 1])
            for truth in world.truth.prompts
        ]
        return float(torch.stack(tilted).mean())

    searched = minimize_scalar(lambda x: (mean_under(x) - 0.6) ** 2, bounds=(-5, 5), method="bounded").x
    assert float(fit.coefficients) == pytest.approx(searched, abs=1e-4)
    assert mean_under(float(fit.coefficients)) == pytest.approx(0.6, abs=1e-9)
    pooled = fit_moments(features[:, 1:2], base, [0.6], ["its word"])
    assert abs(float(pooled.coefficients) - searched) > 0.01, "one Z for all would be another target"


def test_sampled_fits_are_within_their_errors_of_the_exact_one(world: Conditional) -> None:
    base = torch.cat([truth.base_logprob for truth in world.truth.prompts])
    features = torch.cat([truth.features for truth in world.truth.prompts])
    exact = float(fit_moments(features[:, 1:2], base, [0.6], ["w"], world.samples.prompt_ids).coefficients)
    off = []
    for seed in range(40):
        target = fit_target([replace(world.target.terms[1], coefficient=0.0)], _word_sample(world, 800, seed))
        (term,) = target.report.terms
        assert term.coefficient is not None
        assert term.achieved.value == pytest.approx(0.6, abs=1e-8)
        off.append((term.coefficient.value - exact) / term.coefficient.se)
    assert abs(sum(off) / 25) < 0.6
    assert 0.4 < sum(x * x for x in off) / 25 < 2.0


def _word_sample(world: Conditional, n: int, seed: int) -> BaseSample:
    return draw_base_sample(world.base, [word_feature()], n, world.prompts, LENGTH, seed)


def test_few_samples_of_each_prompt_bias_the_fit_which_is_said(world: Conditional) -> None:
    base = torch.cat([truth.base_logprob for truth in world.truth.prompts])
    features = torch.cat([truth.features for truth in world.truth.prompts])
    exact = float(fit_moments(features[:, 1:2], base, [0.4], ["w"], world.samples.prompt_ids).coefficients)
    prompts = world.base.encode_prompts(TEXTS * 200, {"word": WORDS * 200})
    fits = {}
    for each in (4, 16):
        sample = draw_base_sample(world.base, [word_feature()], 3200, prompts, LENGTH, 1, samples_per_prompt=each)
        fits[each] = fit_target([replace(world.target.terms[1], goal=0.4, coefficient=0.0)], sample)
    assert fits[4].terms[0].coefficient > fits[16].terms[0].coefficient > exact - 0.1
    assert any("only 4 samples" in warning for warning in fits[4].report.warnings)
    assert not any("samples:" in warning for warning in fits[16].report.warnings)


def test_a_feature_of_the_prompt_alone_cannot_be_tilted(world: Conditional) -> None:
    feature = callable_feature(lambda prompts, **columns: [float(len(p) > 2) for p in prompts], name="long prompt")
    sample = draw_base_sample(world.base, [feature], 200, world.prompts, LENGTH, 0)
    with pytest.raises(UnreachableTargetError, match="'long prompt': it was the same in all samples of each prompt"):
        fit_target([Term(feature, "moment", 0.7)], sample)
    half = draw_base_sample(world.base, [word_feature()], 200, world.prompts, LENGTH, 0)
    with pytest.raises(UnreachableTargetError, match=r"averaged over prompts, 0 to 1\."):
        fit_target([Term(word_feature(), "moment", 1.2)], half)


def test_prompts_that_the_target_does_not_allow_take_no_part_in_the_fit(world: Conditional) -> None:
    never = callable_feature(lambda texts, word: [float(w != "d") for w in word], name="not d", binary=True)
    terms = [Term(never, "filter", 1.0), replace(world.target.terms[1], coefficient=0.0)]
    sample = draw_base_sample(world.base, [never, word_feature()], 400, world.prompts, LENGTH, 0)
    report = fit_target(terms, sample).report
    assert any("1 of 4 prompts have no sample that the target allows" in warning for warning in report.warnings)
    assert report.terms[1].achieved.value == pytest.approx(0.6, abs=1e-8)
    allowed = sample.samples.prompt_ids != WORDS.index("d")
    rest = BaseSample(sample.samples.select(allowed), sample.features[allowed], LENGTH)
    alone = fit_target([terms[1]], replace(rest, features=rest.features[:, 1:])).report
    assert alone.terms[0].coefficient == report.terms[1].coefficient
    assert alone.log_z.value == pytest.approx(report.log_z.value)


def test_what_the_fit_reports_is_the_mean_over_prompts(world: Conditional) -> None:
    report = report_fit(world.target, drawn(world, 8000))
    kl = torch.tensor([exact_kl(truth.logprob, truth.base_logprob) for truth in world.truth.prompts]).mean()
    assert within(report.log_z, float(world.truth.log_z.mean()))
    assert within(report.kl_p_a, float(kl))
    for term, moment in zip(report.terms[1:], world.truth.moments[1:].tolist(), strict=True):
        assert within(term.achieved, moment)


def within(estimate: Estimate | None, truth: float, least: float = 1e-3) -> bool:
    assert estimate is not None
    assert 0 < estimate.se < 0.2
    return abs(estimate.value - truth) < 4 * max(estimate.se, least)


def test_the_trainer_knows_z_of_each_prompt(world: Conditional) -> None:
    trainer = trainer_of(world, batch_size=300, fit=3000, learning_rate=1e-6, max_grad_norm=1e-9)
    assert isinstance(trainer.partition, PromptPartition)
    before = (trainer.partition.by_prompt - world.truth.log_z).abs().max()
    assert before < 0.2
    for _ in range(20):
        trainer.train_step()
    after = (trainer.partition.by_prompt - world.truth.log_z).abs().max()
    assert after < 0.08
    assert trainer.partition.rounds == 21


def test_a_batch_is_pulled_with_z_of_its_own_prompts(world: Conditional, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(world, batch_size=6, fit=400)
    seen: list[Tensor] = []
    original = trainer.scorer.accumulate

    def accumulate(batch: RolloutBatch, log_z: Tensor, guide: Any = None) -> Any:
        expected = torch.tensor([by_prompt[TEXTS.index(str(text))] for text in batch.samples.prompt_texts])
        torch.testing.assert_close(log_z, expected.double())
        seen.append(log_z)
        return original(batch, log_z, guide)

    monkeypatch.setattr(trainer.scorer, "accumulate", accumulate)
    for _ in range(3):
        by_prompt = trainer.partition.by_prompt.tolist()  # type: ignore[union-attr]
        trainer.train_step()
    assert len(seen) == 3
    assert len({float(x) for x in seen[0]}) == 4


@pytest.mark.parametrize("each", [None, 20])
def test_a_step_reports_means_over_prompts(world: Conditional, each: int | None) -> None:
    trainer = trainer_of(
        world, policy=near(world.base, 0.03), batch_size=4000, fit=4000, samples_per_prompt=each, rule="kl"
    )
    policy = trainer.roles.policy.copy()
    metrics = trainer.train_step()
    assert within(metrics.log_z, float(world.truth.log_z.mean()))
    assert within(metrics.kl_p_pi, float(world.truth.kl(policy).mean()))
    assert within(metrics.tv_p_pi, float(world.truth.tv(policy).mean()))
    for k, name in enumerate(metrics.target_moments):
        assert abs(metrics.target_moments[name].value - float(world.truth.moments[k])) < 4 * max(
            metrics.target_moments[name].se, 1e-3
        )


def test_an_evaluation_tells_prompts_apart_and_averages_them(world: Conditional) -> None:
    policy = near(world.base, 0.03)
    result = evaluate_policy(
        Roles(policy, base=world.base), world.target, 4000, prompts=world.prompts, max_completion_length=LENGTH, seed=2
    )
    kl, tv = world.truth.kl(policy), world.truth.tv(policy)
    assert result.prompts == 4
    _agrees(result, float(kl.mean()), float(tv.mean()), float(world.truth.log_z.mean()), world.truth.moments)
    assert [one.prompt for one in result.per_prompt] == TEXTS
    for c, one in enumerate(result.per_prompt):
        assert one.samples == 1000
        _agrees(one, float(kl[c]), float(tv[c]), float(world.truth.log_z[c]), world.truth.prompts[c].moments)
    record = result.to_json()
    assert record["per_prompt"][1]["kl_p_pi"] == result.per_prompt[1].kl_p_pi.to_json()
    assert record["prompts"] == 4
    base = evaluate_base(drawn(world, 6000, each=7), world.target, 3000)
    assert Counter(base.per_prompt[c].samples for c in range(4)) == {750: 4}
    assert within(base.log_z, float(world.truth.log_z.mean()))


def _agrees(result: Any, kl: float, tv: float, log_z: float, moments: Tensor) -> None:
    assert within(result.kl_p_pi, kl)
    assert within(result.tv_p_pi, tv)
    assert within(result.log_z, log_z)
    for estimate, moment in zip(result.target_moments.values(), moments.tolist(), strict=True):
        assert abs(estimate.value - moment) < 4 * max(estimate.se, 1e-3)


def test_one_prompt_is_told_as_ever(world: Conditional) -> None:
    one = world.base.encode_prompts(TEXTS[:1], {"word": WORDS[:1]})
    result: Evaluation = evaluate_policy(
        Roles(near(world.base), base=world.base), world.target, 40, prompts=one, max_completion_length=LENGTH
    )
    assert (result.prompts, result.per_prompt) == (1, ())
    sample = draw_base_sample(world.base, world.target.features, 100, one, LENGTH, 0)
    metrics = step_metrics(
        _scores(world, sample), sample.features, world.target, Partition.empty().updated(_log_weights(world, sample))
    )
    assert metrics.log_z == Partition.empty().updated(_log_weights(world, sample)).log_z


def _log_weights(world: Conditional, sample: BaseSample) -> Tensor:
    return world.target.log_tilt(sample.features)


def _scores(world: Conditional, sample: BaseSample) -> Any:
    from tiltlm.evaluation.scores import Scores

    logprob = sample.samples.sequence_logprob
    score = world.target.log_score(logprob, sample.features)
    return Scores(logprob, logprob, logprob, score, torch.zeros_like(logprob), prompt_ids=sample.samples.prompt_ids)


@pytest.mark.parametrize("method", ["gdc++", "guided", "rloo", "brain"])
def test_training_brings_every_prompt_closer(world: Conditional, method: str) -> None:
    if method == "guided":  # needs features that can be read off a prefix
        target = TiltedTarget((world.target.terms[0], world.target.terms[2]))
        truth = exact_conditional(world.base, target, world.samples)
        here = replace(world, target=target, truth=truth)
    else:
        here = world
    rule = "guided" if method == "guided" else "on_policy"
    trainer = trainer_of(
        here, method=method, batch_size=200, fit=1200, samples_per_prompt=5, learning_rate=0.004, rule=rule
    )
    before = here.truth.kl(trainer.roles.policy)
    for _ in range(25):
        trainer.train_step()
    after = here.truth.kl(trainer.roles.policy)
    if method == "rloo":  # maximizes a reward, compared within each prompt
        gains = [(t.under(trainer.roles.policy).exp() - t.base_logprob.exp()) @ t.reward for t in here.truth.prompts]
        assert float(torch.stack(gains).mean()) > 0.3
        assert min(gains) > 0
    else:
        assert (after < 0.6 * before).all()


@pytest.mark.parametrize("architecture", ["gpt2", "bart", "t5"])
def test_the_default_method_brings_every_prompt_closer_on_any_architecture(architecture: str) -> None:
    """Also where one feature is read off a prefix, and one, which reads a column, is not."""
    world = conditional(architecture)
    settings = {"batch_size": 200, "fit": 1200, "samples_per_prompt": 5, "learning_rate": 0.004}
    trainer = trainer_of(world, method=MethodConfig().name, **settings)
    assert trainer.roles.policy.guide is not None
    before = world.truth.kl(world.base)
    for _ in range(12):
        trainer.train_step()
    assert (world.truth.kl(trainer.roles.policy) < 0.6 * before).all()


@pytest.mark.parametrize("each", [1, 3])
def test_batches_hold_the_same_number_of_each_prompt_in_turn(world: Conditional, each: int) -> None:
    trainer = trainer_of(world, batch_size=9, fit=36, samples_per_prompt=each, reuse_fit_samples=True)
    texts: list[str | None] = []
    while len(texts) < 36 + 9 * 5:
        batch = trainer.draw()
        assert set(Counter(batch.samples.prompt_texts).values()) <= ({each} if each > 1 else {2, 3})
        texts += batch.samples.prompt_texts
    assert texts == [TEXTS[i // each % 4] for i in range(len(texts))]


def test_more_prompts_than_a_batch_holds_all_have_their_turn(world: Conditional) -> None:
    prompts = world.base.encode_prompts(["a " * (i + 1) for i in range(11)], {"word": ["a"] * 11})
    here = replace(world, prompts=prompts)
    trainer = trainer_of(here, batch_size=6, fit=12, samples_per_prompt=2)
    seen: Counter[int] = Counter()
    for _ in range(11):
        batch = trainer.draw()
        seen.update(batch.samples.prompt_ids.tolist())
        longest = max(len(str(text).split()) for text in batch.samples.prompt_texts)
        assert batch.samples.prompts.tokens.shape[1] == longest, "no batch is padded to the longest prompt of all"
    assert sorted(seen) == list(range(11))
    assert set(seen.values()) == {6}


def test_a_resumed_run_knows_z_of_each_prompt_bit_for_bit(world: Conditional, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 6, "save_steps": 0, "samples_per_prompt": 4}
    whole = trainer_of(world, **settings)
    whole.train()
    first = trainer_of(world, folder=tmp_path, **settings)
    for _ in range(3):
        first.train_step()
    first.save()
    second = trainer_of(world, folder=tmp_path, **settings)
    assert second.resume()
    second.train()
    for one, other in zip(whole.parameters.values(), second.parameters.values(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(whole.partition.by_prompt, second.partition.by_prompt)  # type: ignore[union-attr]


def test_an_encoder_decoder_model_is_conditional_in_the_same_way() -> None:
    world = conditional("t5")
    trainer = trainer_of(world, policy=near(world.base), rule="kl")
    batch = every_completion(world)
    trainer.accumulate(batch, world.truth.log_z[batch.samples.prompt_ids])
    truth = flat(true_gradient(world, trainer.roles.policy), trainer)
    assert truth.norm() > 0.1
    assert float((gradient(trainer) - truth).abs().max()) < 1e-6
    assert measure_samples([word_feature()], world.samples).shape == (len(world.samples), 1)
