"""Guides: value functions of prefixes that are added to a model's logits, computed from a small state per row."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tiltlm.errors import ModelError
from tiltlm.lm.transitions import Transitions


@dataclass(frozen=True)
class LogitBias:
    """The logit bias of a guide at P positions, given by its ``states`` [P] after ``columns`` [P] sampled tokens."""

    guide: Guide
    states: Tensor
    columns: Tensor

    def at(self, piece: slice) -> Tensor:
        """log ψ of every next token [p, V] at these positions."""
        return self.guide.logit_bias_at(self.states[piece], self.columns[piece])


@dataclass(frozen=True)
class Guide:
    """A value function ψ of prefixes; it depends on a state, one of S, and on the number of tokens read.

    ``transitions`` [S, V] gives the state after a token, and S + s if the token ends the text in state s.
    ``log_value_table`` [T + 1, 2S] gives log ψ(state, tokens read), less the constant ``log_scale``. Every row begins
    in ``start``. A guided model draws v with probability proportional to a(v|x_<t) ψ(x_<t v), normalized at each token.
    So its log-probabilities are exact whatever ψ is. Source: twisted sampling, Zhao et al. 2024 (arXiv 2404.17546).
    """

    transitions: Tensor | Transitions
    log_value_table: Tensor
    start: int = 0
    log_scale: float = 0.0

    def logit_bias(self, states: Tensor, t: int) -> Tensor:
        """log ψ of every next token [N, V], without ``log_scale``, for ``states`` [N] after ``t`` tokens.

        A row that has ended gets any values.
        """
        after = self.log_value_table[min(t + 1, len(self.log_value_table) - 1)]
        states = states % len(self.transitions)
        if len(states) < len(self.transitions):
            return after[self.transitions[states]]
        # Rows share states: look up each state only once.
        return after[self.transitions[:]].index_select(0, states)

    def logit_bias_at(self, states: Tensor, columns: Tensor) -> Tensor:
        """log ψ of every next token [P, V], without ``log_scale``, for ``states`` [P] after ``columns`` [P] tokens."""
        count = len(self.transitions)
        # Positions share states: look up each pair of state and column only once.
        pairs, place = torch.unique(columns * count + states % count, return_inverse=True)
        after = (pairs // count + 1).clamp_max(len(self.log_value_table) - 1)
        return self.log_value_table[after[:, None], self.transitions[pairs % count]].index_select(0, place)

    def begin(self, n: int) -> Tensor:
        """The states [n] of rows before their first token."""
        return torch.full((n,), self.start, dtype=torch.long, device=self.transitions.device)

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        """The states [N] after ``tokens`` [N]; a row that has ended keeps its state."""
        open_rows = states < len(self.transitions)
        after = self.transitions[torch.where(open_rows, states, 0), tokens]
        return torch.where(open_rows, after, states)

    def states(self, tokens: Tensor) -> Tensor:
        """The states [N, T] before each of ``tokens`` [N, T]."""
        state, before = self.begin(len(tokens)), []
        for column in tokens.unbind(-1):
            before.append(state)
            state = self.advance(state, column)
        return torch.stack(before, 1)

    def log_values(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """log ψ [N, T + 1], with ``log_scale``, before each of ``tokens`` [N, T] and after the last.

        ``mask`` [N, T] marks the sampled tokens; after a text's end its value stays the same.
        """
        before = self.states(tokens)
        states = torch.cat([before, self.advance(before[:, -1], tokens[:, -1])[:, None]], 1)
        read = torch.arange(states.shape[1], device=tokens.device)
        found = self.log_value_table[read.clamp_max(len(self.log_value_table) - 1), states]
        return found.gather(1, read.minimum(mask.sum(1, keepdim=True))) + self.log_scale

    def bias_of(self, tokens: Tensor, rows: Tensor, columns: Tensor) -> LogitBias:
        """The logit bias at P positions of completions [N, T], given by their ``rows`` [P] and ``columns`` [P]."""
        return LogitBias(self, self.states(tokens)[rows, columns], columns)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the guide as safetensors."""
        table = self.transitions
        parts = {"transitions": table} if isinstance(table, Tensor) else vars(table)
        tensors = {name: _narrow(tensor.cpu()).contiguous() for name, tensor in parts.items()}
        # The key is that of the first version, so that every version reads every file.
        tensors["log_twist"] = self.log_value_table.cpu().contiguous()
        # safetensors writes several entries in a random order, so there is only one.
        save_file(tensors, path, {"guide": json.dumps({"start": self.start, "log_scale": self.log_scale})})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Guide:
        """Read a guide that ``save`` wrote. Raises ModelError if the file is damaged."""
        try:
            with safe_open(path, "pt") as file:
                settings = json.loads(file.metadata()["guide"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                log_value_table = tensors.pop("log_twist")
                changes = tensors.pop("changes", None)
                wide = {name: tensor.long() for name, tensor in tensors.items()}
                table = wide["transitions"] if changes is None else Transitions(changes=changes, **wide)
                return Guide(table, log_value_table, settings["start"], settings["log_scale"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"{path} is damaged ({error}): the model's guide cannot be read; copy the file again"
            ) from error

    def to(self, device: torch.device, dtype: torch.dtype) -> Guide:
        """The guide on another device, with ``log_value_table`` in the dtype of the logits it is added to."""
        return replace(
            self, transitions=self.transitions.to(device), log_value_table=self.log_value_table.to(device, dtype)
        )


def _narrow(whole: Tensor) -> Tensor:
    """The same whole numbers in the smallest integer dtype that holds them."""
    most = int(whole.max())
    return whole.to(next(d for d in (torch.uint8, torch.int16, torch.int32) if most <= torch.iinfo(d).max))
