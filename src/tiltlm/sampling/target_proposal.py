"""The proposal of a sampler, the base, the guided base or a policy, and the weights of its draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from tiltlm.errors import UsageError, nearest
from tiltlm.estimation import effective_sample_size, log_importance_weights
from tiltlm.guides import guide_toward
from tiltlm.lm import Guide, Prompts, Roles, Samples
from tiltlm.rollouts import LocalRollouts, RolloutsOf
from tiltlm.targets import BaseSample, Target, measure_samples

Source = Literal["base", "guided", "policy"]
SOURCES: dict[str, Source] = {"base": "base", "guided": "guided", "policy": "policy"}
SOURCE_NAMES: dict[Source, str] = {"base": "the base", "guided": "the guided base", "policy": "the policy"}
# Trial draws of each proposal, from which the nearest is chosen, and the most prompts of a trial.
TRIAL_DRAWS, TRIAL_PROMPTS = 256, 16


@dataclass(frozen=True)
class Draws:
    """Samples of a proposal with their log-weights, log P(x) − log q(x) [N], float64 on the CPU."""

    samples: Samples
    log_weights: Tensor

    def __len__(self) -> int:
        return len(self.samples)

    def select(self, rows: Tensor) -> Draws:
        """These rows [N'], indices on the CPU."""
        return Draws(self.samples.select(rows.to(self.samples.tokens.device)), self.log_weights[rows])

    def by_prompt(self) -> Iterator[tuple[int, Draws]]:
        """The index of each prompt with its draws, in the order in which they were drawn."""
        index = self.samples.prompt_index.cpu()
        prompts = list(dict.fromkeys(index.tolist()))
        for prompt in prompts:
            yield prompt, self if len(prompts) == 1 else self.select((index == prompt).nonzero().squeeze(-1))

    @staticmethod
    def concatenate(parts: Sequence[Draws]) -> Draws:
        """The rows of all parts, which come from the same prompts and proposal."""
        samples = Samples.concatenate([part.samples for part in parts])
        return Draws(samples, torch.cat([part.log_weights for part in parts]))


@dataclass(frozen=True)
class TargetProposal:
    """A distribution q of completions of ``prompts``: the base, the policy, or the base under ``guide``.

    ``reason`` says why it was chosen, "" where the caller named it.
    """

    roles: Roles
    target: Target
    source: Source
    prompts: Prompts
    max_completion_length: int = 40
    guide: Guide | None = None
    reason: str = ""
    rollouts: RolloutsOf = LocalRollouts

    @torch.no_grad()
    def draw(self, n: int, prompts: Sequence[int], generator: torch.Generator) -> Draws:
        """``n`` completions of the prompts with these indices, in turn, with their weights."""
        with self.roles.use("policy" if self.source == "policy" else "base") as model:
            samples = self.rollouts(model).generate(
                self.prompts.select(prompts),
                n,
                generator=generator,
                max_completion_length=self.max_completion_length,
                guide=self.guide,
            )
        logprob = base_logprob = samples.sequence_logprob.cpu()
        features = measure_samples(self.target.features, samples)
        if self.source != "base" or not samples.exact:
            with self.roles.use("base") as base:
                base_logprob = base.sequence_logprob(samples)
            if self.source == "base":
                # With one log a for P and q, P/q is exactly P/a, and a bound of P/a holds for every draw.
                logprob = base_logprob
        log_weights = log_importance_weights(self.target.log_score(base_logprob, features), logprob)
        prompt_index = torch.tensor(prompts, device=samples.tokens.device)[samples.prompt_index]
        return Draws(replace(samples, prompts=self.prompts, prompt_index=prompt_index), log_weights)


def build_proposal(
    source: str | None,
    roles: Roles,
    target: Target,
    *,
    policy: bool,
    base_sample: BaseSample | None = None,
    prompts: Prompts,
    max_completion_length: int = 40,
) -> TargetProposal:
    """The proposal ``source``, by default the available one nearest to the target.

    The default is the guided base where there is a ``base_sample``, on which the target was fitted, or else the base;
    or the policy, where there is one and 256 draws of it have a larger ESS. Raises UsageError for an unavailable one.
    """
    if source is None:
        own = "guided" if base_sample is not None else "base"
        candidates = [own, "policy"] if policy else [own]
        given: dict[str, Any] = {
            "policy": policy,
            "base_sample": base_sample,
            "prompts": prompts,
            "max_completion_length": max_completion_length,
        }
        return _nearest([build_proposal(one, roles, target, **given) for one in candidates])
    if source not in SOURCES:
        raise UsageError(f"proposal: '{source}' is not known; {nearest(source, SOURCES)}")
    if source == "policy" and not policy:
        raise UsageError("proposal: there is no tuned policy here; choose base or guided")
    guide = None
    if source == "guided":
        with roles.use("base") as base:
            if base_sample is None:
                raise UsageError(
                    "guided: a guide needs the base's samples that the target was fitted on, and they are not there; "
                    "choose another proposal, with rejection, qrs, resample or mcmc"
                )
            guide = guide_toward(base, target, base_sample)
    return TargetProposal(roles, target, SOURCES[source], prompts, max_completion_length, guide)


def _nearest(proposals: Sequence[TargetProposal]) -> TargetProposal:
    """The proposal whose trial draws have the largest ESS."""
    if len(proposals) == 1:
        return proposals[0]
    sizes = []
    for proposal in proposals:
        generator = torch.Generator(proposal.roles.policy.device).manual_seed(TRIAL_DRAWS)
        draws = proposal.draw(TRIAL_DRAWS, range(min(TRIAL_PROMPTS, len(proposal.prompts))), generator)
        sizes.append(sum(effective_sample_size(part.log_weights).value for _, part in draws.by_prompt()))
    chosen = max(range(len(proposals)), key=sizes.__getitem__)
    shown = ", ".join(f"{size:.0f} for {SOURCE_NAMES[one.source]}" for size, one in zip(sizes, proposals, strict=True))
    name = SOURCE_NAMES[proposals[chosen].source]
    reason = f"draws come from {name}: the ESS of {TRIAL_DRAWS} trial draws is {shown}"
    return replace(proposals[chosen], reason=reason)
