"""The critic: a linear head on the policy's hidden states that estimates the reward to come."""

from __future__ import annotations

import torch
from torch import Tensor

from tiltlm.errors import UsageError
from tiltlm.lm import ForwardPass, LanguageModel, Samples


class Critic:
    """V(x_<t) for every sampled token, from the hidden state before the output layer. It starts at 0.

    Raises UsageError for a model whose logits are not a linear layer of its hidden states.
    """

    def __init__(self, policy: LanguageModel) -> None:
        layer = policy.output_layer
        if layer is None:
            raise UsageError(
                f"method: a value head reads the hidden states before a linear output layer, and '{policy.name}' makes "
                f"its logits otherwise; choose a method without a critic, e.g. rloo"
            )
        dtype = torch.float64 if layer.weight.dtype == torch.float64 else torch.float32
        self.head = torch.nn.Linear(layer.in_features, 1, device=policy.device, dtype=dtype)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Its parameters by name, for the optimizer and for checkpoints."""
        return {f"critic.{name}": parameter for name, parameter in self.head.named_parameters()}

    def values(self, samples: Samples, read: ForwardPass) -> Tensor:
        """The value before each sampled token [N, T], 0 where masked, with gradient."""
        with torch.autocast(read.hidden.device.type, enabled=False):
            found = self.head(read.hidden.to(self.head.weight.dtype)).squeeze(-1)
        table: Tensor = found.new_zeros(samples.tokens.shape)
        return table.index_put((samples.flat_rows, samples.flat_columns), found)
