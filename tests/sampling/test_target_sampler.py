"""Samplers on an enumerable model: their texts follow the distribution that the forecast states."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from enumerable import tiny_model
from tiltlm.errors import NumericalError, UnreachableTargetError, UsageError
from tiltlm.estimation import (
    Closeness,
    Estimate,
    acceptance_rate,
    accepted_closeness,
    chain_acceptance,
    chain_closeness,
    proposal_closeness,
    resampled_closeness,
)
from tiltlm.exact import ExactTarget, enumerate_completions, exact_target, kl_gradient
from tiltlm.features import build_feature, feature, length
from tiltlm.lm import LanguageModel, Roles, Samples, SamplingSettings
from tiltlm.sampling import (
    SAMPLERS,
    Draws,
    GuidedBase,
    Metropolis,
    QuasiRejection,
    Rejection,
    Resampling,
    Sampler,
    TargetProposal,
    TargetSampler,
    TargetSamples,
    build_proposal,
    build_sampler,
    known_bound,
    sample_target,
)
from tiltlm.sampling.target_sampler import ROUND_DRAWS
from tiltlm.targets import BaseSample, Term, TiltedTarget, constrain, draw_base_sample
from tiny_world import LORA, near

LENGTH = 4
NO_C = Term(build_feature({"not": {"contains": "c"}}).renamed("no c"), "filter", 1.0)
AN_A = Term(build_feature({"contains": "a"}).renamed("a"), "moment", 0.6, 1.5)
WORDS = Term(length("words").renamed("words"), "reward", coefficient=0.6)
BINARY = TiltedTarget((NO_C, AN_A))
TARGET = TiltedTarget((NO_C, AN_A, WORDS))
SIZES: dict[str, Any] = {"max_completion_length": LENGTH, "pilot": 512}


@cache
def base() -> LanguageModel:
    return tiny_model("gpt2", "pad_is_eos")


@cache
def policy() -> LanguageModel:
    return near(base(), 0.01)


@cache
def base_sample() -> BaseSample:
    return draw_base_sample(base(), TARGET.features, 300, None, LENGTH, seed=11)


@cache
def listed(prompt: str | None = None) -> Samples:
    return enumerate_completions(base(), prompt, max_completion_length=LENGTH)


@cache
def truth(target: TiltedTarget = TARGET, prompt: str | None = None) -> ExactTarget:
    return exact_target(base(), target, listed(prompt))


def proposal(source: str | None = "base", target: TiltedTarget = TARGET, **settings: Any) -> TargetProposal:
    prompts = base().encode_prompts(settings.pop("prompts", None))
    roles = settings.pop("roles", None) or Roles(policy(), base=base())
    given: dict[str, Any] = {"policy": True, "base_sample": base_sample(), "prompts": prompts, **settings}
    return build_proposal(source, roles, target, max_completion_length=LENGTH, **given)


@cache
@torch.no_grad()
def logprob_of(source: str) -> Tensor:
    """log q [N] of every completion."""
    if source == "guided":
        guided = replace(listed(), guide=proposal("guided").guide)
        return base().logprob(guided).sum(-1)
    return {"base": base(), "policy": policy()}[source].logprob(listed(), settings=SamplingSettings()).sum(-1)


def exact_weights(source: str, target: TiltedTarget = TARGET) -> tuple[Tensor, Tensor]:
    """log w [N] and q [N] of every completion."""
    return truth(target).target_logscore - logprob_of(source), logprob_of(source).exp()


def chi_squared(samples: Samples, distribution: Tensor, prompt: str | None = None) -> float:
    """The p-value of the χ² test of the texts against a distribution [N]; rare completions form one cell."""
    places = {tuple(ids): i for i, ids in enumerate(listed(prompt).completion_ids)}
    counts = torch.zeros(len(places), dtype=torch.float64)
    for ids in samples.completion_ids:
        counts[places[tuple(ids)]] += 1
    expected = distribution / distribution.sum() * len(samples)
    assert float(counts[expected == 0].sum()) == 0
    rare = expected < 5
    cells = [(counts[~rare], expected[~rare]), (counts[rare].sum()[None], expected[rare].sum()[None])]
    found, wanted = (torch.cat(parts) for parts in zip(*cells, strict=True))
    kept = wanted > 0
    return float(stats.chisquare(found[kept].numpy(), wanted[kept].numpy()).pvalue)


def drawn(n: int, sampler: str | Sampler, source: str, target: TiltedTarget = TARGET, **settings: Any) -> TargetSamples:
    given: dict[str, Any] = {**SIZES, "policy": policy(), "base_sample": base_sample(), "seed": 1, **settings}
    return sample_target(base(), target, n, sampler=sampler, proposal=source, **given)


def assert_drawn_from(result: TargetSamples, distribution: Tensor, other: Tensor) -> None:
    """The texts follow a distribution, and are enough to reject another one."""
    assert chi_squared(result.samples, distribution) > 1e-3
    assert chi_squared(result.samples, other) < 1e-6


def test_rejection_from_the_base_is_exact() -> None:
    p, a = truth(BINARY).logprob.exp(), truth(BINARY).base_logprob.exp()
    assert_drawn_from(drawn(4_000, "rejection", "base", BINARY), p, p + 0.2 * a)
    only = TiltedTarget((NO_C,))
    assert known_bound(only) == 0
    result = drawn(3_000, "rejection", "base", only)
    assert chi_squared(result.samples, truth(only).logprob.exp()) > 1e-3
    assert result.forecast.acceptance.value == pytest.approx(math.exp(truth(only).log_z), abs=0.1)


@pytest.mark.parametrize("source", ["policy", "guided"])
def test_rejection_with_a_given_bound(source: str) -> None:
    log_w, _ = exact_weights(source)
    result = drawn(1_500, Rejection(float(log_w.max())), source)
    assert_drawn_from(result, truth().logprob.exp(), logprob_of("base").exp() * (log_w > -math.inf))


@pytest.mark.parametrize("source", ["base", "policy", "guided"])
def test_quasi_rejection_follows_p_beta(source: str) -> None:
    log_w, q = exact_weights(source)
    # The guided base is so near that a higher bound has no visible effect.
    log_beta = float(log_w[log_w > -math.inf].quantile(0.05 if source == "guided" else 0.4))
    result = drawn(4_000, QuasiRejection(log_beta), source)
    p_beta = q * log_w.clamp_max(log_beta).exp()
    assert chi_squared(result.samples, p_beta) > 1e-3
    assert chi_squared(result.samples, truth().logprob.exp()) < (0.05 if source == "guided" else 1e-6)


def test_quasi_rejection_chooses_its_bound_on_the_pilot() -> None:
    sampler = TargetSampler(proposal("policy"), QuasiRejection(), 1_500, seed=4, pilot=512)
    forecast = sampler.forecast()
    assert forecast.closeness.kl.value <= 0.01 + 1e-9
    assert isinstance(sampler.sampler, QuasiRejection)
    texts = Draws.concatenate(list(sampler.texts()))
    log_w, q = exact_weights("policy")
    assert chi_squared(texts.samples, q * log_w.clamp_max(sampler.sampler.bound).exp()) > 1e-3
    wanted = drawn(5, QuasiRejection(acceptance=0.3), "policy", pilot=2_000).forecast
    assert wanted.acceptance.value == pytest.approx(0.3)


def test_long_chains_converge_to_p() -> None:
    result = drawn(2_000, Metropolis(chains=16, burn_in=30, thin=16), "policy")
    assert_drawn_from(result, truth().logprob.exp(), logprob_of("policy").exp() * (truth().features[:, 0] > 0))


def test_short_chains_follow_the_distribution_of_the_forecast() -> None:
    # A prompt for each text, so that no two texts share a chain.
    n, steps = 2_500, 2
    result = drawn(n, Metropolis(burn_in=steps), "base", prompts=[None] * n, pilot=2)
    log_w, q = exact_weights("base")
    hits = log_w > -math.inf
    start = q[hits] / q[hits].sum()
    moves = (q[hits] * (log_w[hits] - log_w[hits][:, None]).clamp_max(0).exp()).fill_diagonal_(0)
    moves = moves + torch.diag(1 - moves.sum(1))
    distribution = torch.zeros_like(q)
    distribution[hits] = start @ torch.linalg.matrix_power(moves, steps)
    assert_drawn_from(result, distribution, truth().logprob.exp())
    assert chi_squared(result.samples, q * hits) < 1e-6


def test_resampling_follows_the_distribution_of_its_pool_size() -> None:
    # A pool for each text, so that texts are independent.
    n, pool = 2_500, 3
    result = drawn(n, Resampling(oversample=pool, min_pool=1), "base", prompts=[None] * n, pilot=2)
    log_w, q = exact_weights("base")
    p = truth().logprob.exp()
    # The first of three draws, given the sum of the other two weights, by enumeration of pairs of weights.
    w = log_w.exp()
    values, place = w.unique(return_inverse=True)
    probability = torch.zeros_like(values).index_add_(0, place, q)
    pairs, sums = probability[:, None] * probability, values[:, None] + values
    distribution = torch.stack(
        [q_x * w_x * pool * (pairs / (w_x + sums)).sum() if w_x > 0 else w_x for q_x, w_x in zip(q, w, strict=True)]
    )
    assert_drawn_from(result, distribution, p)


def test_a_large_pool_follows_p() -> None:
    result = drawn(1_000, Resampling(oversample=40), "policy")
    # Systematic resampling varies less than independent draws, so the test passes more often than it should.
    assert_drawn_from(result, truth().logprob.exp(), logprob_of("base").exp() * (truth().features[:, 0] > 0))
    # Three pools, the last one is smaller.
    sampler = Resampling(oversample=40, min_pool=512)
    assert (sampler.texts_per_pool, sampler.pool_size(1_000), result.draws) == (409, 16_360, 40_000)


def test_the_guided_sampler_returns_draws_of_the_guided_base() -> None:
    result = drawn(3_000, "guided", "guided")
    assert_drawn_from(result, logprob_of("guided").exp(), logprob_of("base").exp())
    assert result.draws == 3_000
    places = {tuple(ids): i for i, ids in enumerate(listed().completion_ids)}
    rows = [places[tuple(ids)] for ids in result.samples.completion_ids]
    torch.testing.assert_close(result.log_weights, exact_weights("guided")[0][rows], rtol=0, atol=1e-9)


def exact_forecast(sampler: Sampler, log_w: Tensor, q: Tensor, n: int) -> tuple[Estimate, Closeness]:
    """The exact forecast, by the same formulas on all completions."""
    match sampler:
        case Metropolis():
            return chain_acceptance(log_w, q), chain_closeness(log_w, sampler.burn_in, q)
        case Resampling():
            return Estimate(n / sampler.total_draws(n), 0.0), resampled_closeness(log_w, sampler.pool_size(n), q)
        case QuasiRejection():
            return acceptance_rate(log_w, sampler.bound, q), accepted_closeness(log_w, sampler.bound, q)
        case Rejection():
            zero = Estimate(0.0, 0.0)
            return acceptance_rate(log_w, sampler.bound, q), Closeness(zero, zero)
    return Estimate(1.0, 0.0), proposal_closeness(log_w, q)


@pytest.mark.parametrize(
    ("sampler", "source"),
    [
        (Rejection(), "base"),
        (QuasiRejection(), "base"),
        (QuasiRejection(0.3), "policy"),
        (Metropolis(burn_in=5), "policy"),
        (Metropolis(burn_in=0), "base"),
        (Resampling(oversample=4, min_pool=1), "base"),
        (GuidedBase(), "guided"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_forecasts_hold(sampler: Sampler, source: str) -> None:
    target = BINARY if type(sampler) is Rejection else TARGET
    work = TargetSampler(proposal(source, target), sampler, 5, seed=2, pilot=8_000)
    forecast = work.forecast()
    log_w, q = exact_weights(source, target)
    acceptance, closeness = exact_forecast(work.sampler, log_w, q, 5)
    plain = proposal_closeness(log_w, q)
    for name, found, exact in (
        ("acceptance", forecast.acceptance, acceptance),
        ("KL", forecast.closeness.kl, closeness.kl),
        ("TV", forecast.closeness.tv, closeness.tv),
        ("KL of q", forecast.proposal_closeness.kl, plain.kl),
        ("TV of q", forecast.proposal_closeness.tv, plain.tv),
    ):
        assert abs(found.value - exact.value) <= 4 * found.se + 1e-9, (name, found, exact)
        assert found.se < 0.05
    assert (forecast.proposals, forecast.texts, forecast.prompts, forecast.source) == (8_000, 5, 1, source)
    weights = log_w.exp()
    assert forecast.ess.value == pytest.approx(8_000 * float((q @ weights) ** 2 / (q @ weights**2)), rel=0.1)


@pytest.mark.parametrize("sampler", [QuasiRejection(1.0), Metropolis(chains=3, burn_in=8, thin=20), Resampling(12)])
def test_each_prompt_has_texts_of_its_own_target(sampler: Sampler) -> None:
    prompts = ["a", "b d", None]
    result = drawn(1_800, sampler, "policy", prompts=prompts)
    assert Counter(result.samples.prompt_texts) == {"a": 600, "b d": 600, None: 600}
    for place, prompt in enumerate(prompts):
        p = truth(TARGET, prompt).logprob
        distribution = p.exp()
        if isinstance(sampler, QuasiRejection):
            with torch.no_grad():
                q = policy().logprob(listed(prompt), settings=SamplingSettings()).sum(-1)
            log_w = truth(TARGET, prompt).target_logscore - q
            distribution = q.exp() * log_w.clamp_max(1.0).exp()
        own = result.samples.select(result.samples.prompt_index == place)
        # The prompt makes a difference that would be seen.
        other = truth(TARGET, prompts[place - 1]).logprob.exp()
        assert chi_squared(own, distribution, prompt) > 1e-3
        assert chi_squared(own, other, prompt) < 1e-6


def test_texts_and_prompts_that_do_not_come_out_even() -> None:
    prompts = ["a", "b", "a b"]
    for sampler in SAMPLERS:
        target = BINARY if sampler == "rejection" else TARGET
        result = drawn(7, sampler, None, target, prompts=prompts)  # type: ignore[arg-type]
        assert sorted(Counter(result.samples.prompt_texts).values()) == [2, 2, 3]
    # More prompts than the pilot looks at, or than there are texts.
    many = [f"{first} {second} {third}" for first in "abcd" for second in "abcd" for third in "abcd"]
    work = TargetSampler(proposal("policy", prompts=many), Metropolis(burn_in=3), 30, seed=0, pilot=100)
    assert work.forecast().prompts == 16
    assert work.pilot_size == 112
    texts = Draws.concatenate(list(work.texts()))
    assert set(Counter(texts.samples.prompt_index.tolist()).values()) == {1}
    assert len(texts) == work.found == 30


def test_a_seed_fixes_the_texts_and_is_none_that_fitted_the_target() -> None:
    for sampler in ("qrs", "resample", "mcmc", "guided"):
        texts = [drawn(40, sampler, None, seed=seed).samples.texts for seed in (3, 3, 4)]  # type: ignore[arg-type]
        assert texts[0] == texts[1] != texts[2]
    fit = draw_base_sample(base(), TARGET.features, 40, None, LENGTH, seed=3).samples
    own = proposal().draw(40, [0], TargetSampler(proposal(), Metropolis(), 1, seed=3).generator)
    assert fit.texts != own.samples.texts
    assert drawn(40, "mcmc", "base", seed=None).samples.texts != drawn(40, "mcmc", "base", seed=None).samples.texts


class Counting(TargetProposal):
    """A proposal that records the sizes of its draws."""

    asked: list[int]

    def draw(self, n: int, prompts: Any, generator: torch.Generator) -> Draws:
        self.asked.append(n)
        return super().draw(n, prompts, generator)


def counting(source: str, target: TiltedTarget = TARGET) -> Counting:
    plain = proposal(source, target)
    made = Counting(plain.roles, plain.target, plain.source, plain.prompts, plain.max_completion_length, plain.guide)
    object.__setattr__(made, "asked", [])
    return made


@pytest.mark.parametrize("sampler", [Rejection(), QuasiRejection(), Metropolis(), Resampling(), GuidedBase()])
def test_draws_come_in_rounds_and_as_many_as_forecast(sampler: Sampler) -> None:
    rejects = type(sampler) is Rejection
    source = counting("guided" if isinstance(sampler, GuidedBase) else "base", BINARY if rejects else TARGET)
    work = TargetSampler(source, sampler, 900, seed=0, pilot=1_500)
    forecast, reported = work.forecast(), []
    texts = list(work.texts(lambda found, n: reported.append((found, n))))
    assert sum(map(len, texts)) == work.found == 900
    assert reported[-1] == (900, 900)
    assert [found for found, _ in reported] == sorted(found for found, _ in reported)
    assert sum(source.asked) == work.drawn
    assert max(source.asked) <= ROUND_DRAWS
    exact = not isinstance(sampler, Rejection | Metropolis)
    assert work.drawn == forecast.draws if exact else abs(work.drawn / forecast.draws - 1) < 0.25
    if not isinstance(sampler, GuidedBase):
        assert all(float(part.log_weights.min()) > -math.inf for part in texts)


def test_the_pilot_suffices_for_few_texts() -> None:
    for sampler in (Rejection(), QuasiRejection(3.0), Metropolis(), Resampling()):
        result = drawn(4, sampler, "base", BINARY, pilot=1_000)
        assert result.draws == result.forecast.draws == 1_000
    # The pilot's weights determined β, so its draws are biased under that β.
    assert drawn(4, QuasiRejection(), "base", pilot=1_000).draws > 1_000


def test_too_many_draws_are_refused_before_the_start_and_on_the_way() -> None:
    rare = TiltedTarget((Term(build_feature({"contains": "a b a b"}), "filter", 1.0),))
    assert math.exp(truth(rare).log_z) == pytest.approx(0.00097, abs=1e-5)
    with pytest.raises(
        UnreachableTargetError, match=r"10,000 draws are allowed, and 500 texts take about [\d,]+ draws"
    ):
        drawn(500, "rejection", "base", rare, pilot=4_000, max_draws=10_000)
    work = TargetSampler(proposal("base", rare), Rejection(), 9, seed=5, pilot=4_000, max_draws=10**6)
    work.forecast()
    work.max_draws = work.forecast().draws  # as after a pilot with too high an acceptance rate
    work.sampler = Rejection(math.log(4.0))
    with pytest.raises(UnreachableTargetError, match=r"9 texts take about [\d,]+ draws; [\d,]+ were found in"):
        list(work.texts())
    assert 0 < work.found < 9
    with pytest.raises(
        UnreachableTargetError, match=r"none of 20 draws .* fewer than 0\.1 .* 5 texts .* than 34 draws"
    ):
        drawn(5, "rejection", "base", rare, pilot=20)


def test_notes_report_uncertainty() -> None:
    rare = TiltedTarget((Term(build_feature({"contains": "b b b"}), "filter", 1.0), WORDS))
    (note,) = drawn(2, "qrs", "base", rare, pilot=1_000).forecast.notes
    assert note.startswith("only ")
    assert "larger pilot" in note
    sticky = drawn(2, Metropolis(thin=1), "base", TiltedTarget((NO_C, AN_A))).forecast.notes
    assert any("repeat the one before" in note for note in sticky)
    assert drawn(2, Metropolis(), "guided").forecast.notes == ()
    few = TargetSampler(proposal("base", rare, prompts=["a", "b", "c"]), Metropolis(), 3, pilot=90, seed=0).forecast()
    assert few.notes[0].startswith("2 of the pilot's 3 prompts had no draw in the target's support")
    assert math.isfinite(few.closeness.kl.value)


def test_adapters_on_shared_weights_give_the_same_distributions() -> None:
    roles = Roles(base().copy().with_lora(**LORA))
    for name, part in roles.trainable().items():
        part.data.add_(0.3 * torch.randn(part.shape, generator=torch.Generator().manual_seed(len(name))).to(part))
    prompts = base().encode_prompts(None)
    made = build_proposal("policy", roles, TARGET, policy=True, prompts=prompts, max_completion_length=LENGTH)
    work = TargetSampler(made, QuasiRejection(2.0), 2_000, seed=0, pilot=512)
    texts = Draws.concatenate(list(work.texts()))
    with torch.no_grad():
        q = roles.policy.logprob(listed(), settings=SamplingSettings()).sum(-1)
    assert float((q - logprob_of("base")).abs().max()) > 0.1
    log_w = truth().target_logscore - q
    assert chi_squared(texts.samples, q.exp() * log_w.clamp_max(2.0).exp()) > 1e-3


def test_a_fitted_target_sets_prompts_length_and_guide() -> None:
    fitted = constrain(base(), {AN_A.feature: 0.5}, samples=500, prompts=["a", "b"], max_completion_length=3, seed=0)
    result = sample_target(base(), fitted, 200, seed=0, pilot=400)
    assert result.forecast.source == "guided"
    assert result.samples.tokens.shape[1] <= 3
    assert set(result.samples.prompt_texts) == {"a", "b"}
    share = sum("a" in text for text in result.samples.texts) / 200
    assert share == pytest.approx(0.5, abs=0.15)
    assert sample_target(base(), fitted, 3, sampler="rejection", seed=0, pilot=400).forecast.source == "base"


def tuned() -> LanguageModel:
    """A policy tuned near p with the exact gradient of KL(p‖π)."""
    model = base().copy()
    named = dict(model.model.named_parameters())
    optimizer = torch.optim.Adam(named.values(), lr=0.02)
    for _ in range(120):
        for name, gradient in kl_gradient(model, truth()).items():
            named[name].grad = gradient
        optimizer.step()
    return model


def test_the_nearest_proposal_is_the_default() -> None:
    said = r"draws come from the (.*): the ESS of 256 trial draws is \d+ for the guided base, \d+ for the policy"
    few = draw_base_sample(base(), TARGET.features, 4, None, LENGTH, seed=0)
    for model, sample, nearest in ((near(base(), 0.1), base_sample(), "guided base"), (tuned(), few, "policy")):
        made = proposal(None, roles=Roles(model, base=base()), base_sample=sample)
        found = re.fullmatch(said, made.reason)
        assert found is not None
        assert found[1] == nearest
        assert made.source == nearest.split()[0]
        assert TargetSampler(made, Metropolis(), 1, pilot=64, seed=0).forecast().notes[0] == made.reason
    assert proposal(None, policy=False).source == "guided"
    assert proposal(None, policy=False, base_sample=None).source == "base"


@pytest.mark.parametrize(
    ("sampler", "source", "settings", "said"),
    [
        ("rejecton", None, {}, "sampler: 'rejecton'.*did you mean 'rejection'"),
        ("rejection", None, {}, "'words', which is no binary feature.*qrs"),
        ("rejection", "policy", {}, "rejection takes draws of the base, not of the policy.*qrs"),
        ("guided", "base", {}, "guided takes draws of the guided base, not of the base"),
        ("qrs", "bas", {}, "proposal: 'bas'.*did you mean 'base'"),
        ("qrs", "policy", {"policy": None}, "no tuned policy"),
        ("guided", None, {"base_sample": None}, "samples that the target was fitted on, and they are not there"),
        (QuasiRejection(acceptance=0.999), "base", {}, "acceptance: 0.999 cannot be reached"),
        ("qrs", None, {"pilot": 1}, "pilot: 1"),
        ("qrs", None, {"max_draws": 0}, "max_draws: 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    sampler: Any, source: Any, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        drawn(3, sampler, source, **settings)


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("qrs", {"thin": 3}, "thin: a setting of mcmc, not of qrs"),
        ("mcmc", {"log_beta": 0.0}, "log_beta: a setting of rejection and qrs, not of mcmc"),
        ("mcmc", {"chains": 0}, "chains: 0"),
        ("mcmc", {"thin": 0}, "thin: 0"),
        ("mcmc", {"burn_in": -1}, "burn_in: -1"),
        ("resample", {"oversample": 0}, "oversample: 0"),
        ("qrs", {"acceptance": 1.5}, "acceptance: 1.5"),
        ("qrs", {"acceptance": 0.5, "log_beta": 1.0}, "give one of them"),
        ("rejection", {"log_beta": math.inf}, "log_beta: inf"),
    ],
)
def test_invalid_settings_are_refused(name: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        build_sampler(name, **settings)


def test_a_target_of_ones_own_has_no_known_bound_but_a_guide() -> None:
    class Own:
        features = (feature(lambda texts: [len(text) for text in texts], name="own"),)

        def log_score(self, base_logprob: Tensor, features: Tensor) -> Tensor:
            return base_logprob + features[:, 0] / 10

    with pytest.raises(UsageError, match="none is known of this target"):
        drawn(3, "rejection", None, Own())  # type: ignore[arg-type]
    result = drawn(3, "guided", None, Own(), policy=None)  # type: ignore[arg-type]
    assert result.forecast.source == "guided"


def test_a_false_bound_is_an_error() -> None:
    with pytest.raises(NumericalError, match=r"log_beta: 0 is no bound: log P\(x\)/q\(x\) is"):
        drawn(200, Rejection(0.0), "base")


def test_the_curve_trades_acceptance_against_divergence() -> None:
    work = TargetSampler(proposal("base"), QuasiRejection(), 1, seed=0, pilot=2_000)
    curve = work.qrs_curve()
    assert len(curve) == 25
    rates, kls = ([point.acceptance.value for point in curve], [point.closeness.kl.value for point in curve])
    assert rates == sorted(rates, reverse=True)
    assert kls == sorted(kls, reverse=True)
    assert (kls[-1], curve[-1].closeness.tv.value) == pytest.approx((0, 0), abs=1e-9)
    log_w, q = exact_weights("base")
    for point in curve[::6]:
        exact = accepted_closeness(log_w, point.log_beta, q)
        assert abs(point.closeness.kl.value - exact.kl.value) < 4 * point.closeness.kl.se + 0.01
        assert abs(point.acceptance.value - acceptance_rate(log_w, point.log_beta, q).value) < 4 * point.acceptance.se
    # Weights of 0 and 1 give one point.
    binary = TargetSampler(proposal("base", TiltedTarget((NO_C,))), QuasiRejection(), 1, seed=0, pilot=500)
    points = binary.qrs_curve()
    assert len(points) == 1
    assert points[0].closeness.kl.value == pytest.approx(0, abs=1e-9)
