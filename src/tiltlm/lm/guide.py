"""A guide: a small state per row that reweights the next token, so that a model writes what is wanted more often."""

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
    """What a guide adds to the logits at P positions, in these ``states`` [P] after ``columns`` [P] tokens."""

    guide: Guide
    states: Tensor
    columns: Tensor

    def at(self, piece: slice) -> Tensor:
        """log ψ of every next token [p, V] at these positions."""
        return self.guide.logit_bias_at(self.states[piece], self.columns[piece])


@dataclass(frozen=True)
class Guide:
    """What a prefix still promises: log ψ for S states of what was read, at each number of tokens read.

    ``transitions`` [S, V] gives the state after a token, S + s where the token ends the text in state s;
    ``log_value_table`` [T + 1, 2S] gives log ψ(state, tokens read), less the constant ``log_scale``. Every row begins
    in ``start``. A guided model draws v with probability proportional to a(v|x_<t) ψ(x_<t v), normalized at each token.
    So its log-probabilities are exact whatever ψ is. Source: twisted sampling, Zhao et al. 2024 (arXiv 2404.17546).
    """

    transitions: Tensor | Transitions
    log_value_table: Tensor
    start: int = 0
    log_scale: float = 0.0

    def logit_bias(self, states: Tensor, t: int) -> Tensor:
        """log ψ of every next token [N, V] for rows in ``states`` [N] that have read ``t`` tokens (any, if ended)."""
        after = self.log_value_table[min(t + 1, len(self.log_value_table) - 1)]
        states = states % len(self.transitions)
        if len(states) < len(self.transitions):
            return after[self.transitions[states]]
        # Rows share states: look each state's tokens up once.
        return after[self.transitions[:]].index_select(0, states)

    def logit_bias_at(self, states: Tensor, columns: Tensor) -> Tensor:
        """log ψ of every next token [P, V] in these states [P], each after as many tokens as its column [P] says."""
        count = len(self.transitions)
        # Positions share states: look each pair of state and column up once.
        pairs, place = torch.unique(columns * count + states % count, return_inverse=True)
        after = (pairs // count + 1).clamp_max(len(self.log_value_table) - 1)
        return self.log_value_table[after[:, None], self.transitions[pairs % count]].index_select(0, place)

    def begin(self, n: int) -> Tensor:
        """The states [n] of rows that have read nothing."""
        return torch.full((n,), self.start, dtype=torch.long, device=self.transitions.device)

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        """The states [N] after ``tokens`` [N]; a row that has ended stays as it is."""
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
        """log ψ [N, T + 1], its constant and all, before each of ``tokens`` [N, T] and at the end of the text."""
        before = self.states(tokens)
        states = torch.cat([before, self.advance(before[:, -1], tokens[:, -1])[:, None]], 1)
        read = torch.arange(states.shape[1], device=tokens.device)
        found = self.log_value_table[read.clamp_max(len(self.log_value_table) - 1), states]
        # Behind its end a text promises what it did there.
        return found.gather(1, read.minimum(mask.sum(1, keepdim=True))) + self.log_scale

    def bias_of(self, tokens: Tensor, rows: Tensor, columns: Tensor) -> LogitBias:
        """What it adds to the logits at these places [P] of completions [N, T]."""
        return LogitBias(self, self.states(tokens)[rows, columns], columns)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as safetensors."""
        table = self.transitions
        written = {"transitions": table} if isinstance(table, Tensor) else vars(table)
        tensors = {name: _narrow(tensor.cpu()).contiguous() for name, tensor in written.items()}
        tensors["log_twist"] = self.log_value_table.cpu().contiguous()
        # One entry: several would come in another order each time.
        save_file(tensors, path, {"guide": json.dumps({"start": self.start, "log_scale": self.log_scale})})

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Guide:
        """What ``save`` wrote. Raises ModelError where the file is damaged."""
        try:
            with safe_open(path, "pt") as file:
                told = json.loads(file.metadata()["guide"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                log_value_table = tensors.pop("log_twist")
                changes = tensors.pop("changes", None)
                wide = {name: tensor.long() for name, tensor in tensors.items()}
                table = wide["transitions"] if changes is None else Transitions(changes=changes, **wide)
                return Guide(table, log_value_table, told["start"], told["log_scale"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{path} is damaged ({error}): the model's guide is not whole; copy it anew") from error

    def to(self, device: torch.device, dtype: torch.dtype) -> Guide:
        """The same guide on another device, with ``log_value_table`` in the dtype of the logits that it is added to."""
        return replace(
            self, transitions=self.transitions.to(device), log_value_table=self.log_value_table.to(device, dtype)
        )


def _narrow(whole: Tensor) -> Tensor:
    """The same whole numbers in few bytes."""
    most = int(whole.max())
    return whole.to(next(d for d in (torch.uint8, torch.int16, torch.int32) if most <= torch.iinfo(d).max))
