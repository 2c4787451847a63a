"""A hash of a model's weights, fast enough for every start, so that a run never resumes with other weights."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# Bytes of a row when a tensor is read as a table.
ROW_BYTES = 2**15
# Parameters that peft adds to a model: they are not weights of the base.
OF_ADAPTERS = ("lora_", "modules_to_save", "trainable_tokens_")


@torch.no_grad()
def hash_weights(module: torch.nn.Module) -> str:
    """A hash of the base's weights in their order, the same on every device and with or without an adapter.

    Every bit counts, but sums are hashed, several times as fast as a cryptographic hash of all bytes. It tells weights
    apart that were trained or loaded differently; it does not protect against forgery.
    """
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        if not any(part in name for part in OF_ADAPTERS):
            digest.update(f"{tuple(parameter.shape)} {parameter.dtype}".encode())
            for summed in _sums(parameter.detach()):
                digest.update(summed.cpu().numpy().tobytes())
    return digest.hexdigest()


def _sums(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tensor's bytes as a table of integers, summed over rows and over columns, and the rest that fills no row.

    Integer sums do not depend on their order. Either sum alone would miss swapped rows or columns.
    """
    data = tensor.contiguous().view(-1).view(torch.uint8)
    full = len(data) // ROW_BYTES * ROW_BYTES
    table = data[:full].clone() if data.storage_offset() % 8 else data[:full]
    rows = table.view(torch.int64).view(-1, ROW_BYTES // 8)
    return rows.sum(0), rows.sum(1), data[full:]
