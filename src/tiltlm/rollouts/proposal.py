"""The name of the distribution that a batch was drawn from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["base", "guided", "policy", "earlier", "mixture", "pool"]


@dataclass(frozen=True)
class Proposal:
    """The proposal q of a batch.

    ``base`` and ``guided`` are the base, alone or reweighted by the guide. ``policy`` is the policy as it is now, or,
    with a ``number``, as it was for that batch. ``earlier`` is the policy kept at step ``number`` as a proposal of its
    own. ``mixture`` are fit samples that the base and guides drew, ``pool`` are samples of a replay buffer.
    """

    kind: Kind
    number: int | None = None

    def __str__(self) -> str:
        """Its name in ``metrics.jsonl``, as ``step 7``."""
        if self.kind == "earlier":
            return "an earlier policy" if self.number is None else f"step {self.number}"
        return self.kind if self.number is None else f"{self.kind} {self.number}"

    @staticmethod
    def parse(name: str) -> Proposal:
        """The proposal with this name. Raises ValueError for an unknown one."""
        for kind in ("base", "guided", "policy", "mixture", "pool"):
            if name == kind:
                return Proposal(kind)
        word, _, number = name.partition(" ")
        if word == "step" and number.isdigit():
            return Proposal("earlier", int(number))
        if word == "policy" and number.isdigit():
            return Proposal("policy", int(number))
        if name == str(EARLIER):
            return EARLIER
        raise ValueError(f"'{name}' is not the name of a proposal")


BASE, GUIDED, POLICY = Proposal("base"), Proposal("guided"), Proposal("policy")
EARLIER, MIXTURE, POOL = Proposal("earlier"), Proposal("mixture"), Proposal("pool")
