"""A full off-policy step: tiltlm (GDC; rules `kl` and `published`) against a direct version of the paper's algorithm.

    python benchmarks/off_policy.py [--device cuda] [--case embedded:512] [--cycle 10] [--rounds 3]

A turn is a cycle of --cycle steps, with one check of the proposal at its last step; seconds are those of a cycle. The
direct side implements the formulas of arXiv 2012.11635, algorithm 1: three full copies of the model (base a, policy π,
proposal q), samples of q by generate(), all samples scored under all three, weights P/(Z q) with a moving average for
Z, and at a check ten more batches of q, scored under all three, for estimates of KL(p‖π) and KL(p‖q). All sides tune
all weights with Adam and clip gradients at norm 1. All sides compute the estimates at a check and always replace the
proposal. So all pay for the copy and, after the first cycle, which is the warm-up, sample from an earlier policy.
--rows sets the rows per forward pass of the direct side.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from models import Case, add_cases, folder_of
from side_by_side import Side, Turns, add_device, parser, show, take_turns

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from tiltlm.training.proposal_rules import ProposalRule

EXTRA_BATCHES = 10


class AlwaysReplaces:
    """A proposal rule that computes its check and always replaces the proposal."""

    def __init__(self, rule: ProposalRule) -> None:
        self._rule = rule

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rule, name)

    def replaces(self, *arguments: Any, **keywords: Any) -> bool:
        self._rule.replaces(*arguments, **keywords)
        return True


def ours(turns: Turns, folder: str, batch: int, length: int, dtype: str, device: str, cycle: int, rule: str) -> None:
    from sides import our_trainer

    from tiltlm.objectives import GDC
    from tiltlm.training.proposal_rules import proposal_rule

    always: Any = AlwaysReplaces(proposal_rule(rule, check_steps=cycle))
    trainer = our_trainer(folder, objective=GDC(), rule=always, batch=batch, length=length, dtype=dtype, device=device)
    turns.serve(lambda: [trainer.train_step() for _ in range(cycle)])


class DirectGDC:
    """GDC by its formulas: nothing is shared, cached or skipped."""

    def __init__(self, folder: str, batch: int, length: int, rows: int, device: str) -> None:
        import torch
        from sides import BETA, LEARNING_RATE, load

        self.batch, self.length, self.rows, self.beta = batch, length, rows, BETA
        self.base, self.tokenizer = load(folder, device=device)
        self.policy, self.proposal = (load(folder, device=device)[0] for _ in range(2))
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=LEARNING_RATE)
        self.z, self.batches = 0.0, 0
        torch.manual_seed(0)

    def sample(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sequences [N, 1 + T] of the proposal with BOS, the mask [N, T] of their sampled tokens, and rewards [N]."""
        import torch
        from sides import generate, vowels

        sequences, eos = generate(self.proposal, self.tokenizer, self.batch, self.length), self.tokenizer.eos_token_id
        ended = (sequences[:, 1:] == eos).cumsum(-1)
        mask = (ended - (sequences[:, 1:] == eos).long()) == 0
        ids = [row[keep].tolist() for row, keep in zip(sequences[:, 1:], mask, strict=True)]
        rewards = vowels(self.tokenizer.batch_decode(ids, skip_special_tokens=True), ids)
        return sequences, mask, torch.tensor(rewards, dtype=torch.float64, device=mask.device)

    def score(self, model: PreTrainedModel, sequences: Tensor, mask: Tensor) -> Tensor:
        """Log-probability [N] of sequences under a model, in one forward pass."""
        import torch

        logprobs = model(sequences[:, :-1], use_cache=False).logits.log_softmax(-1)
        chosen = logprobs.gather(-1, sequences[:, 1:, None]).squeeze(-1)
        return torch.where(mask, chosen, 0.0).double().sum(-1)

    def score_all(self, model: PreTrainedModel, sequences: Tensor, mask: Tensor) -> Tensor:
        """Log-probability [N] of a whole batch, without gradient."""
        import torch

        with torch.no_grad():
            pieces = zip(sequences.split(self.rows), mask.split(self.rows), strict=True)
            return torch.cat([self.score(model, *piece) for piece in pieces])

    def average(self, weights: Tensor) -> None:
        """Update the moving average Z with the mean of P/q over a batch."""
        self.z = (self.batches * self.z + float(weights.mean())) / (self.batches + 1)
        self.batches += 1

    def step(self) -> None:
        """Gradient ascent along mean(P/(Z q) ∇ log π)."""
        import torch

        sequences, mask, rewards = self.sample()
        log_a, log_q = (self.score_all(model, sequences, mask) for model in (self.base, self.proposal))
        weights = (log_a + rewards / self.beta - log_q).exp()
        self.average(weights)
        pieces = (tensor.split(self.rows) for tensor in (sequences, mask, weights))
        for tokens, kept, weight in zip(*pieces, strict=True):
            loss = -(weight / self.z * self.score(self.policy, tokens, kept)).sum() / self.batch
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def check(self) -> tuple[float, float]:
        """KL(p‖π) and KL(p‖q) on ten more batches of q; then q ← π."""
        import torch

        parts = []
        for _ in range(EXTRA_BATCHES):
            sequences, mask, rewards = self.sample()
            log_a, log_pi, log_q = (
                self.score_all(model, sequences, mask) for model in (self.base, self.policy, self.proposal)
            )
            log_p = log_a + rewards / self.beta
            self.average((log_p - log_q).exp())
            parts.append(torch.stack([log_p, log_pi, log_q]))
        log_p, log_pi, log_q = torch.cat(parts, dim=1)
        weights = (log_p - log_q).exp() / self.z
        to_policy = float((weights * (log_p - log_pi)).mean()) - math.log(self.z)
        to_proposal = float((weights * (log_p - log_q)).mean()) - math.log(self.z)
        self.proposal.load_state_dict(self.policy.state_dict())
        return to_policy, to_proposal


def direct(turns: Turns, folder: str, batch: int, length: int, cycle: int, rows: int, device: str) -> None:
    loop = DirectGDC(folder, batch, length, rows, device)

    def steps() -> None:
        for _ in range(cycle):
            loop.step()
        loop.check()

    turns.serve(steps)


def main() -> None:
    arguments = parser(__doc__, rounds=3)
    add_cases(arguments, "embedded:512")
    arguments.add_argument("--cycle", type=int, default=10, help="steps per check (10)")
    arguments.add_argument("--rows", type=int, default=32, help="rows per forward pass of the direct side (32)")
    arguments.add_argument("--dtype", choices=("float32", "auto"), default="float32", help="of tiltlm alone (float32)")
    add_device(arguments)
    args = arguments.parse_args()
    if args.quick:
        args.case, args.length, args.rounds, args.cycle = [Case("embedded", 8), Case("tiny", 8)], 5, 2, 2
    for case in args.case:
        with folder_of(case.model) as folder:
            sizes = {"folder": folder, "batch": case.n, "length": args.length, "cycle": args.cycle}
            sizes["device"] = args.device
            trained = args.cycle * case.n
            sides = [
                Side("direct", direct, trained, {**sizes, "rows": args.rows}),
                *(
                    Side(f"ours, rule {rule}", ours, trained, {**sizes, "dtype": args.dtype, "rule": rule})
                    for rule in ("published", "kl")
                ),
            ]
            first, *rest = take_turns(sides, args.rounds)
        what = f"{args.cycle} off-policy steps with a check, {case} of up to {args.length} tokens, {args.dtype}"
        show(what, [(first, result) for result in rest])


if __name__ == "__main__":
    main()
