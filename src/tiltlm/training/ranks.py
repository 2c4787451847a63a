"""The processes that train one run. No other module asks how many there are.

Rows of a batch belong to processes, statistics do not: the scores of all sequences are gathered in rank order, and
every process computes the same estimates and decisions from them (``whole_batch.py``; the advantages in
``scoring.py``). This version trains in one process, so gathering is the identity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from tiltlm.errors import UsageError
from tiltlm.evaluation.scores import Scores
from tiltlm.objectives import Record

if TYPE_CHECKING:
    from accelerate import Accelerator


def check_processes(accelerator: Accelerator) -> None:
    """Raises UsageError under a launcher with several processes."""
    if accelerator.num_processes > 1:
        raise UsageError("this version of tiltlm trains in one process; start it without a multi-process launcher")


class Ranks:
    """Gathers rows [n, ...] of this process into rows [N, ...] of all, and takes this process's rows back."""

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes [N, ...], in rank order."""
        return rows

    def gather_scores(self, scores: Scores) -> Scores:
        """The scores of all processes, in rank order."""
        return scores

    def gather_record(self, record: Record) -> Record:
        """The record of all processes, in rank order."""
        return record

    def own(self, rows: Tensor) -> Tensor:
        """The rows of this process [n, ...], from rows of all [N, ...]."""
        return rows

    def total(self, sums: Tensor) -> Tensor:
        """The sum over processes."""
        return sums
