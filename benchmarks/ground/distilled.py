"""Guided distillation on many runs at once, with the library's chain, objective and mixture."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ground.policies import KeptGuidePolicy
from ground.runs import Budget, Drawn, Falls, Runs
from tiltlm.estimation import mixture
from tiltlm.guides.chain import MarkovChain
from tiltlm.guides.token_states import TokenStates
from tiltlm.guides.value import ValueFunction
from tiltlm.lm.token_scores import gram
from tiltlm.objectives import Guided, GuideRecord, MinimumVariance, Record, estimators


@dataclass(frozen=True)
class Guides:
    """The guide of each of R runs: ``logprobs`` log g(v|node) [R, M, V] and ``log_values`` log ψ(node) [R, M + L]."""

    logprobs: Tensor
    log_values: Tensor


@dataclass(frozen=True)
class Distilled:
    """``objective`` with distillation of its guide, on the fit samples first, then on samples of the guided base.

    With several ``steps`` all batches are kept in a pool. Each update of a batch after its first trains on sequences of
    the pool, weighted by the mixture of base and guide. There is no early stopping: the library's looks at forty
    batches, which is more than a budget of 10,000 sequences has. ``falls`` is the budget with which the learning rate
    falls. With ``keeps_guide`` the policy keeps the guide and is the proposal, with one step per batch.
    """

    objective: Guided
    steps: int = 1
    batch: int = 250
    falls: Falls = ""
    keeps_guide: bool = False

    def train(self, runs: Runs, budget: Budget) -> None:
        """Train until the budget is spent."""
        assert runs.fit_sample is not None, "the guide is estimated from fit samples"
        assert not (self.keeps_guide and self.steps > 1), "the pool's mixture does not include earlier policies"
        guides = keep_guide(runs) if self.keeps_guide else estimate_guides(runs)
        generator, balances = torch.Generator().manual_seed(0), [MinimumVariance() for _ in range(runs.count)]
        pool: list[Drawn] = []
        waiting = [runs.fit_sample.rows(slice(i, i + self.batch)) for i in range(0, len(runs.fit_sample), self.batch)]
        from_base = len(waiting)
        while not runs.spent(budget):
            runs.lower_rates(budget, self.falls)
            fresh = not waiting
            batch = runs.draw(self._proposal(runs, guides), self.batch) if fresh else waiting.pop(0)
            pool.append(batch)
            scored = runs.score(batch)
            log_z = runs.log_z(scored)
            if fresh:
                runs.learn_log_z(scored)
            update(runs, self.objective, batch, guides, log_z, balances)
            if self.steps > 1:
                kept = Drawn.joined(pool)
                share = min(from_base, len(pool)) / len(pool)
                kept = replace(kept, logprob=mixture_of(runs, kept, guides.logprobs, share))
                for _ in range(self.steps - 1):
                    rows = torch.randperm(len(kept), generator=generator)[: self.batch]
                    update(runs, self.objective, kept.rows(rows), guides, log_z, balances)
            runs.note()

    def _proposal(self, runs: Runs, guides: Guides) -> Tensor:
        return runs.policy.log_table().detach() if self.keeps_guide else guides.logprobs


def estimate_guides(runs: Runs) -> Guides:
    """The guides; the base scores the fit samples for them, which counts as passes."""
    assert runs.fit_sample is not None
    runs.passes += len(runs.fit_sample)
    return guides_of(runs)


def guides_of(runs: Runs) -> Guides:
    """The guides from the Markov chain over the automaton's states that the fit samples of each run give."""
    assert runs.fit_sample is not None
    world, fit, graph = runs.world, runs.fit_sample, runs.world.graph
    inner = len(graph.child)
    states = TokenStates.of(world.automaton.transitions, int(world.state[0]), world.automaton.values)
    depth = torch.arange(graph.length).repeat_interleave(torch.tensor(graph.layers))
    depth = torch.cat([depth, torch.full((graph.leaves,), graph.length)])
    passed = torch.cat([fit.nodes, fit.leaf[..., None] + inner], -1)
    logprobs, log_values = [], []
    for r in range(runs.count):
        chain = MarkovChain.empty(states, graph.length)
        visits = torch.bincount(fit.nodes[r].flatten(), minlength=inner).double()
        seen = visits.nonzero().squeeze(-1)
        chain.add(world.state[seen], depth[seen], world.base[seen].exp(), visits[seen], visits[seen])
        cells = torch.arange(graph.length + 1) * 2 * len(states.transitions) + world.state[passed[r]]
        value = ValueFunction(states, cells, graph.length, chain)
        log_tilt, fitted_tilt = runs.log_tilt[r][fit.leaf[r]], runs.targets[r].log_tilt(world.automaton.values)
        guide = value.guide(log_tilt, None, fitted_tilt)
        log_values.append(guide.log_value_table[depth, world.state] + guide.log_scale)
        logprobs.append(graph.tilted(world.base, log_values[-1]).float())
    return Guides(torch.stack(logprobs), torch.stack(log_values))


def keep_guide(runs: Runs) -> Guides:
    """Replace each run's policy by one that keeps its guide."""
    assert not isinstance(runs.policy, KeptGuidePolicy)
    guides = estimate_guides(runs)
    runs.policy = KeptGuidePolicy(runs.policy, runs.world.graph, guides.log_values.float())
    runs.note()
    return guides


def mixture_of(runs: Runs, drawn: Drawn, guide: Tensor, base_share: float) -> Tensor:
    """Log-probabilities of the tokens [R, N, T] under the mixture of base and guide."""
    tables = drawn.under(runs.base), drawn.under(guide)
    length = drawn.tokens.shape[-1]
    return (
        mixture([table.reshape(-1, length) for table in tables], [base_share, 1 - base_share])
        .reshape(drawn.tokens.shape)
        .float()
    )


def records_of(
    runs: Runs, drawn: Drawn, policy: Tensor, guides: Guides, log_z: Tensor, balances: list[MinimumVariance]
) -> list[Record]:
    """The record of each run for the objective; ``policy`` [R, M, V] is log π(v|node)."""
    scored, graph = runs.score(drawn), runs.world.graph
    expected = torch.cat(
        [(runs.world.base[layer] + graph.after(guides.log_values, layer)).logsumexp(-1) for layer in graph], -1
    )
    passed = torch.cat([drawn.nodes, drawn.leaf[..., None] + len(graph.child)], -1).flatten(1)
    log_values = guides.log_values.gather(1, passed).reshape(*drawn.leaf.shape, -1) - log_z[:, None, None]
    next_log_values = expected.gather(1, drawn.nodes.flatten(1)).reshape(drawn.nodes.shape) - log_z[:, None, None]
    guide_logprobs = drawn.under(guides.logprobs).double()
    return [
        replace(
            record,
            guide=GuideRecord(guide_logprobs[r], log_values[r], next_log_values[r], balances[r].weights(graph.length)),
        )
        for r, record in enumerate(runs.records(scored, drawn.under(policy), log_z))
    ]


def gram_of(drawn: Drawn, policy: Tensor, guide: Tensor) -> Tensor:
    """``NextToken.gram`` [R, N, T, 3], from log π and log g [R, M, V]."""
    pi, g = policy.exp(), guide.exp()
    products = torch.stack([(g * g).sum(-1), (g * pi).sum(-1), (pi * pi).sum(-1)], -1)
    rows = drawn.nodes.flatten(1)[..., None].expand(-1, -1, 3)
    theirs, both, ours = products.gather(1, rows).reshape(*drawn.nodes.shape, 3).unbind(-1)
    return gram(theirs, both, ours, drawn.under(g), drawn.under(pi))


def learn_mixture_weights(
    balances: list[MinimumVariance], records: list[Record], drawn: Drawn, policy: Tensor, guide: Tensor
) -> None:
    """Update each run's mixture weights from the estimators on a batch, with log π and log g [R, M, V]."""
    for balance, record, products in zip(balances, records, gram_of(drawn, policy, guide), strict=True):
        balance.add(estimators(record), products)
        balance.settle()


def surrogate_coefficients(
    runs: Runs, objective: Guided, drawn: Drawn, guides: Guides, records: list[Record]
) -> Tensor:
    """The coefficients of residual and distillation terms at each node and token [R, M, V]."""
    coefficients = torch.stack([objective.coefficients(record) for record in records])
    weights = torch.stack([objective.distillation_weights(record) for record in records]).float() / len(drawn)
    distilled = torch.zeros(guides.logprobs.shape[:2]).scatter_add_(1, drawn.nodes.flatten(1), weights.flatten(1))
    return runs.total_coefficients(drawn, runs.checked(coefficients)) + distilled[..., None] * guides.logprobs.exp()


def update(
    runs: Runs, objective: Guided, drawn: Drawn, guides: Guides, log_z: Tensor, balances: list[MinimumVariance]
) -> None:
    """One step. Base and policy score every sequence; the base is needed for the guide."""
    table = runs.policy.log_table()
    runs.passes += 2 * len(drawn)
    records = records_of(runs, drawn, table.detach(), guides, log_z, balances)
    runs.optimizer.step(runs.gradients(table, surrogate_coefficients(runs, objective, drawn, guides, records)))
    if objective.correction:
        learn_mixture_weights(balances, records, drawn, table.detach(), guides.logprobs)
