"""The seam to whatever draws samples: where it is not exact, base and policy are read instead of trusted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiltlm.evaluation.evaluate import draw_control, evaluate_base, evaluate_model, evaluate_policy
from tiltlm.lm import LanguageModel, Roles, Samples
from tiltlm.rollouts import LocalRollouts, Proposal
from tiltlm.sampling.target_proposal import TargetProposal
from tiltlm.targets import draw_base_sample, fit_target
from tiltlm.training.checkpoint import load_base_sample, save_base_sample
from tiny_world import LENGTH, World, build_trainer, gradient, near, tiny_world

torch.set_num_threads(1)
OFF = 0.01


@dataclass(frozen=True)
class OtherEngine:
    """Our sampler as another engine would be: its log-probabilities are off by ``off`` nats a token."""

    model: LanguageModel
    off: float = 0.0

    def generate(self, *args: Any, **kwargs: Any) -> Samples:
        drawn = LocalRollouts(self.model).generate(*args, **kwargs)
        return replace(drawn, proposal_logprob=drawn.proposal_logprob + self.off * drawn.mask, exact=False)


def off_by(off: float) -> Any:
    return lambda model: OtherEngine(model, off)


@pytest.fixture(scope="module")
def world() -> World:
    return tiny_world()


def test_local_rollouts_draw_as_the_model_does(world: World) -> None:
    prompts = world.base.encode_prompts(None)
    one = LocalRollouts(world.base).generate(prompts, 7, seed=3, max_completion_length=LENGTH)
    other = world.base.sample(7, prompts, 3, max_completion_length=LENGTH)
    assert one.exact
    assert torch.equal(one.tokens, other.tokens)
    assert torch.equal(one.proposal_logprob, other.proposal_logprob)


def test_what_samples_are_exact_is_kept_by_selecting_and_joining(world: World) -> None:
    few = world.samples.select(torch.arange(4))
    unsure = replace(few, exact=False)
    assert few.trimmed().exact
    assert not unsure.select(torch.arange(2)).trimmed().exact
    assert not Samples.concatenate([few, unsure]).exact


def test_a_base_sample_holds_the_base_own_log_probabilities(world: World) -> None:
    drawn = draw_base_sample(world.base, world.target.features, 300, None, LENGTH, 2, rollouts=off_by(OFF))
    known = draw_base_sample(world.base, world.target.features, 300, None, LENGTH, 2)
    assert drawn.from_base
    assert drawn.base_logprob is not None
    torch.testing.assert_close(drawn.base_logprob, known.samples.proposal_logprob, atol=1e-9, rtol=0)
    # log P is that of the base, log q that of the engine.
    lengths = known.samples.lengths.double()
    torch.testing.assert_close(drawn.log_weights(world.target), known.log_weights(world.target) - OFF * lengths)
    own = drawn.of_the_base()
    assert own.samples.exact
    torch.testing.assert_close(own.samples.sequence_logprob, known.samples.sequence_logprob, atol=1e-9, rtol=0)


def test_a_target_fitted_on_unsure_samples_is_the_same(world: World) -> None:
    terms = world.target.terms
    fitted = [
        fit_target(terms, draw_base_sample(world.base, world.target.features, 300, None, LENGTH, 2, rollouts=make))
        for make in (LocalRollouts, off_by(0.0))
    ]
    assert fitted[0].terms[1].coefficient == pytest.approx(fitted[1].terms[1].coefficient, abs=1e-9)
    assert fitted[0].report.log_z.value == pytest.approx(fitted[1].report.log_z.value, abs=1e-9)


@pytest.mark.parametrize("off", [0.0, OFF])
def test_an_evaluation_reads_both_models(world: World, off: float) -> None:
    roles = Roles(near(world.base, 0.05), base=world.base)
    settings: dict[str, Any] = {"max_completion_length": LENGTH, "seed": 4, "top_p": 0.9}
    exact, unsure = (
        evaluate_policy(roles, world.target, 400, rollouts=make, **settings) for make in (LocalRollouts, off_by(off))
    )
    for name in ("kl_p_pi", "kl_pi_a", "tv_p_pi", "log_z", "ess", "entropy", "perplexity_base"):
        one, other = getattr(exact, name), getattr(unsure, name)
        assert one.value == pytest.approx(other.value, abs=1e-5), name
    assert exact.top_p["entropy"].value == pytest.approx(unsure.top_p["entropy"].value, abs=1e-5)
    control = draw_control(roles, world.target, 200, max_completion_length=LENGTH, rollouts=off_by(off))
    known = draw_control(roles, world.target, 200, max_completion_length=LENGTH)
    one, other = (evaluate_base(sample, world.target, 200) for sample in (control, known))
    assert one.entropy.value == pytest.approx(other.entropy.value, abs=1e-5)
    assert one.kl_p_pi is not None
    assert other.kl_p_pi is not None
    assert one.kl_p_pi.value == pytest.approx(other.kl_p_pi.value, abs=1e-5)


def test_a_kept_base_sample_remembers_whether_it_is_exact(world: World, tmp_path: Path) -> None:
    for make in (LocalRollouts, off_by(OFF)):
        drawn = draw_base_sample(world.base, world.target.features, 20, None, LENGTH, 2, rollouts=make)
        save_base_sample(tmp_path, drawn)
        kept = load_base_sample(tmp_path, world.base)
        assert kept is not None
        assert kept.samples.exact == drawn.samples.exact
        assert torch.equal(kept.log_weights(world.target), drawn.log_weights(world.target))


@pytest.mark.parametrize("off", [-OFF, OFF])
def test_draws_of_the_base_are_weighted_by_its_own_log_probabilities(world: World, off: float) -> None:
    """Otherwise an engine's error would exceed the bound of P/a, and rejection would stop."""
    roles = Roles(world.base, base=world.base)
    exact, unsure = (
        TargetProposal(roles, world.target, "base", world.base.encode_prompts(None), LENGTH, rollouts=make).draw(
            50, [0], torch.Generator().manual_seed(5)
        )
        for make in (LocalRollouts, off_by(off))
    )
    assert torch.equal(exact.samples.tokens, unsure.samples.tokens)
    torch.testing.assert_close(exact.log_weights, unsure.log_weights, atol=1e-9, rtol=0)


def test_a_model_alone_is_measured_by_its_own_numbers(world: World) -> None:
    exact, unsure = (
        evaluate_model(world.base, 100, seed=1, rollouts=make, max_completion_length=LENGTH)
        for make in (LocalRollouts, off_by(OFF))
    )
    assert exact.entropy.value == pytest.approx(unsure.entropy.value, abs=1e-9)


@pytest.mark.parametrize("rule", ["on_policy", "kl"])
@pytest.mark.parametrize("method", ["gdc", "gdc++", "rloo", "ppo"])
def test_training_reads_both_models_and_comes_to_the_same_gradient(world: World, method: str, rule: str) -> None:
    if method == "ppo" and rule == "kl":
        return
    found = []
    for make in (LocalRollouts, off_by(0.0)):
        trainer = build_trainer(world, policy=near(world.base, 0.05), method=method, rule=rule, batch_size=60)
        trainer.drawer.rollouts = make
        batch, _ = trainer.scorer.assess(trainer.draw(), 0.3)
        read = trainer.counter.forward_passes
        trainer.accumulate(batch, 0.3)
        found.append((gradient(trainer), trainer.counter.forward_passes - read, batch))
    (exact, few, _), (unsure, more, batch) = found
    torch.testing.assert_close(exact, unsure, atol=1e-9, rtol=1e-9)
    assert not batch.samples.exact
    # The base, as the proposal, or the policy, on its own samples, is no longer spared its pass.
    assert more >= few
    assert (batch.policy_logprob is None) or method in ("rloo", "ppo")


def test_proposals_have_the_names_of_the_metrics() -> None:
    for name in ("base", "guided", "policy", "policy 3", "step 7", "an earlier policy", "mixture", "pool"):
        assert str(Proposal.parse(name)) == name
    with pytest.raises(ValueError, match="'step x' is not the name of a proposal"):
        Proposal.parse("step x")
