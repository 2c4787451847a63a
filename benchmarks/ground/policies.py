"""Policies that many runs train at once: the first axis of every parameter is the run."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ground.graph import Graph

BETAS = (0.9, 0.999)
EPSILON = 1e-8
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class PrefixNetwork:
    """A hidden layer over the one-hot prefix: logits = W tanh(b_t + Σ_{s<t} E_s[x_s]) + c.

    ``embedding`` [R, T, V, H], ``position`` [R, T, H], ``output`` [R, H, V], ``bias`` [R, V]. All
    prefixes of up to T − 1 tokens are its rows, in the order of a ``prefix_tree``.
    """

    embedding: Tensor
    position: Tensor
    output: Tensor
    bias: Tensor

    @staticmethod
    def random(vocabulary: int, length: int, hidden: int, generator: torch.Generator) -> PrefixNetwork:
        """A network for one run; its distributions are far from uniform."""
        shapes = (1, length, vocabulary, hidden), (1, length, hidden), (1, hidden, vocabulary), (1, vocabulary)
        scales = 0.6, 0.5, 2.5 / hidden**0.5, 0.3
        return PrefixNetwork(*(s * torch.randn(x, generator=generator) for x, s in zip(shapes, scales, strict=True)))

    def copies(self, runs: int) -> PrefixNetwork:
        """``runs`` copies, to be trained."""
        return PrefixNetwork(*_repeated(self.parameters, runs))

    @property
    def parameters(self) -> list[Tensor]:
        """Each [R, ...]."""
        return [self.embedding, self.position, self.output, self.bias]

    def log_table(self) -> Tensor:
        """log π(v|prefix) [R, M, V]."""
        runs, length, _, hidden = self.embedding.shape
        read = self.embedding.new_zeros(runs, 1, hidden)
        layers = []
        for t in range(length):
            layers.append(torch.tanh(read + self.position[:, t, None]))
            if t + 1 < length:
                read = (read[:, :, None] + self.embedding[:, t, None]).reshape(runs, -1, hidden)
        return torch.baddbmm(self.bias[:, None], torch.cat(layers, 1), self.output).log_softmax(-1)


@dataclass(frozen=True)
class NodeNetwork:
    """A hidden layer over the token, state and position of a node: logits = W tanh(E_x + F_s + b_t) + c.

    ``node`` [M, 3] are the last token x, the state s of an automaton and the position t; ``token`` [R, V, H], ``state``
    [R, S, H], ``position`` [R, T, H], ``output`` [R, H, V], ``bias`` [R, V].
    """

    node: Tensor
    token: Tensor
    state: Tensor
    position: Tensor
    output: Tensor
    bias: Tensor

    @staticmethod
    def random(vocabulary: int, states: int, length: int, hidden: int, generator: torch.Generator) -> NodeNetwork:
        """A network for one run; its distributions are far from uniform and depend on the last token alone.

        ``node`` has one row per token.
        """
        token = torch.randn(1, vocabulary, hidden, generator=generator)
        output = 2.5 / hidden**0.5 * torch.randn(1, hidden, vocabulary, generator=generator)
        bias = 0.3 * torch.randn(1, vocabulary, generator=generator)
        node = torch.nn.functional.pad(torch.arange(vocabulary)[:, None], (0, 2))
        return NodeNetwork(node, token, torch.zeros(1, states, hidden), torch.zeros(1, length, hidden), output, bias)

    def copies(self, runs: int) -> NodeNetwork:
        """``runs`` copies, to be trained."""
        return NodeNetwork(self.node, *_repeated(self.parameters, runs))

    @property
    def parameters(self) -> list[Tensor]:
        """Each [R, ...]."""
        return [self.token, self.state, self.position, self.output, self.bias]

    def log_table(self) -> Tensor:
        """log π(v|node) [R, M, V]."""
        x, s, t = self.node.unbind(-1)
        read = self.token.index_select(1, x) + self.state.index_select(1, s) + self.position.index_select(1, t)
        return torch.baddbmm(self.bias[:, None], torch.tanh(read), self.output).log_softmax(-1)


@dataclass(frozen=True)
class KeptGuidePolicy:
    """A policy ∝ network · ψ, normalized at each node, as with the library's ``training.keep_guide``.

    ``log_values`` [R, M + L] are log ψ of the nodes of ``graph``.
    """

    network: PrefixNetwork | NodeNetwork
    graph: Graph
    log_values: Tensor

    @property
    def parameters(self) -> list[Tensor]:
        """Those of the network; ψ is fixed."""
        return self.network.parameters

    def log_table(self) -> Tensor:
        """log π(v|node) [R, M, V]."""
        return self.graph.tilted(self.network.log_table(), self.log_values)


Policy = PrefixNetwork | NodeNetwork | KeptGuidePolicy


def _repeated(parameters: list[Tensor], runs: int) -> list[Tensor]:
    return [p[:1].repeat(runs, *[1] * (p.ndim - 1)).requires_grad_() for p in parameters]


@dataclass
class Adam:
    """Adam with a learning rate for each run [R]; a run's gradient is clipped to norm 1, the library's default.

    ``rate_scale`` [R] multiplies the rates; None for constant rates.
    """

    parameters: list[Tensor]
    rates: Tensor
    rate_scale: Tensor | None = None
    steps: int = 0
    moments: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def step(self, gradients: list[Tensor]) -> None:
        """One update."""
        if not self.moments:
            self.moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]
        self.steps += 1
        norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
        scale = (MAX_GRAD_NORM / norm.clamp_min(MAX_GRAD_NORM)).nan_to_num()
        corrections = [1 - beta**self.steps for beta in BETAS]
        rates = self.rates if self.rate_scale is None else self.rate_scale * self.rates
        with torch.no_grad():
            for p, g, (first, second) in zip(self.parameters, gradients, self.moments, strict=True):
                shape = (-1, *[1] * (p.ndim - 1))
                g = (g * scale.reshape(shape)).nan_to_num(0.0, 0.0, 0.0)
                first.lerp_(g, 1 - BETAS[0])
                second.lerp_(g * g, 1 - BETAS[1])
                root = (second / corrections[1]).sqrt_().add_(EPSILON)
                p.sub_(rates.reshape(shape) / corrections[0] * first / root)
