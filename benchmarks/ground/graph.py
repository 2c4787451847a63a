"""Prefixes as the nodes of a graph in layers, and sums over all its paths."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Graph:
    """``child`` [M, V] is the node after each token from each inner node; layer t has ``layers[t]`` of the M nodes.

    Layers follow each other, node 0 is the empty prefix, and the L ``leaves`` come after all inner nodes. A node is one
    prefix, or all prefixes with the same relevant state.
    """

    child: Tensor
    layers: tuple[int, ...]
    leaves: int

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return len(self.layers)

    @property
    def vocabulary(self) -> int:
        return self.child.shape[1]

    def __iter__(self) -> Iterator[slice]:
        """The inner nodes of each layer."""
        start = 0
        for size in self.layers:
            yield slice(start, start + size)
            start += size

    def after(self, values: Tensor, layer: slice) -> Tensor:
        """From values of all nodes [..., M + L]: those after each token from the nodes of a layer [..., n, V]."""
        child = self.child[layer]
        return values.index_select(-1, child.reshape(-1)).reshape(*values.shape[:-1], *child.shape)

    def log_values(self, logprobs: Tensor, log_tilt: Tensor) -> Tensor:
        """log E[exp(log_tilt(leaf)) | node] [..., M + L] under ``logprobs`` [..., M, V]; ``log_tilt`` is [..., L]."""
        batch = torch.broadcast_shapes(logprobs.shape[:-2], log_tilt.shape[:-1])
        total = log_tilt.new_full((*batch, len(self.child) + self.leaves), -math.inf)
        total[..., len(self.child) :] = log_tilt
        for layer in reversed(list(self)):
            total[..., layer] = (logprobs[..., layer, :] + self.after(total, layer)).logsumexp(-1)
        return total

    def tilted(self, logprobs: Tensor, log_values: Tensor) -> Tensor:
        """log of distribution times values, normalized at each node [..., M, V]; unchanged where values are 0."""
        rows = []
        for layer in self:
            tilted = logprobs[..., layer, :] + self.after(log_values, layer)
            total = tilted.logsumexp(-1, keepdim=True)
            rows.append(torch.where(total > -math.inf, tilted - total, logprobs[..., layer, :]))
        return torch.cat(rows, -2)

    def occupancy(self, logprobs: Tensor) -> Tensor:
        """The probability [..., M + L] that a sequence of a distribution [..., M, V] passes each node."""
        passed = logprobs.new_zeros(*logprobs.shape[:-2], len(self.child) + self.leaves)
        passed[..., 0] = 1.0
        for layer in self:
            mass = passed[..., layer, None] * logprobs[..., layer, :].exp()
            passed.index_add_(-1, self.child[layer].reshape(-1), mass.flatten(-2))
        return passed


def prefix_tree(vocabulary: int, length: int) -> Graph:
    """A graph with one node per prefix, in lexicographic order."""
    layers = tuple(vocabulary**t for t in range(length))
    starts = torch.tensor([sum(layers[:t]) for t in range(length + 1)])
    child = [
        starts[t + 1] + torch.arange(size)[:, None] * vocabulary + torch.arange(vocabulary)
        for t, size in enumerate(layers)
    ]
    return Graph(torch.cat(child), layers, vocabulary**length)


def last_tokens(transitions: Tensor, length: int, state: int = 0, token: int = 0) -> tuple[Graph, Tensor, Tensor]:
    """A graph with a node for each length, last token and state of an automaton [S, V] that a prefix can have.

    Also returns token and state of all nodes [M + L]. ``state`` and ``token`` are those of the empty prefix.
    """
    vocabulary, end = transitions.shape[1], 0
    layers, child = [torch.tensor([state * vocabulary + token])], []
    for _ in range(length):
        after = transitions[layers[-1] // vocabulary] * vocabulary + torch.arange(vocabulary)
        reached, places = after.unique(return_inverse=True)
        end += len(layers[-1])
        child.append(end + places)
        layers.append(reached)
    nodes = torch.cat(layers)
    graph = Graph(torch.cat(child), tuple(map(len, child)), len(layers[-1]))
    return graph, nodes % vocabulary, nodes // vocabulary
