"""A hash of a model's weights, quick enough to take at every start, so that a run never goes on with other ones."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tiltlm.lm.model import LanguageModel

# Bytes of a row when a tensor is read as a table.
ROW_BYTES = 2**15
# What peft adds to a model: no weights of the base.
OF_ADAPTERS = ("lora_", "modules_to_save", "trainable_tokens_")


@torch.no_grad()
def fingerprint(model: LanguageModel) -> str:
    """A hash of the base's weights in their order, the same on every device and with or without an adapter on them.

    Every bit counts, but what is hashed are sums, several times as fast to take as a cryptographic hash of all bytes:
    it tells weights apart that were trained or loaded otherwise, and withstands no one who forges them.
    """
    if model.fingerprint is not None:
        return model.fingerprint
    digest = hashlib.sha256()
    for name, parameter in model.model.named_parameters():
        if not any(part in name for part in OF_ADAPTERS):
            digest.update(f"{tuple(parameter.shape)} {parameter.dtype}".encode())
            for summed in _sums(parameter.detach()):
                digest.update(summed.cpu().numpy().tobytes())
    return digest.hexdigest()


def _sums(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tensor's bytes as a table of integers, summed over rows and over columns; and the bytes that fill no row.

    Integer sums do not depend on their order. Either sum alone would miss an exchange of rows or of columns.
    """
    data = tensor.contiguous().view(-1).view(torch.uint8)
    full = len(data) // ROW_BYTES * ROW_BYTES
    table = data[:full].clone() if data.storage_offset() % 8 else data[:full]
    rows = table.view(torch.int64).view(-1, ROW_BYTES // 8)
    return rows.sum(0), rows.sum(1), data[full:]
