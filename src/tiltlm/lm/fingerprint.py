"""A fast hash of a model's weights, so that a run never resumes with other weights."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# Bytes in a row of the table that a tensor is split into.
ROW_BYTES = 2**15
# Parts of the names of parameters that peft adds to a model.
ADAPTER_NAMES = ("lora_", "modules_to_save", "trainable_tokens_")


@torch.no_grad()
def hash_weights(module: torch.nn.Module) -> str:
    """A hash of the base's weights in order; the same on every device, with or without an adapter.

    It hashes sums over all bits, which is several times as fast as hashing all bytes. It detects weights that were
    trained or loaded differently. It does not protect against forgery.
    """
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        if not any(part in name for part in ADAPTER_NAMES):
            digest.update(f"{tuple(parameter.shape)} {parameter.dtype}".encode())
            for summed in _sums(parameter.detach()):
                digest.update(summed.cpu().numpy().tobytes())
    return digest.hexdigest()


def _sums(tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over rows and over columns of the tensor's bytes as a table of integers, and the bytes after its last row.

    Integer sums do not depend on the order of addition. One sum alone would miss swapped rows or columns.
    """
    data = tensor.contiguous().view(-1).view(torch.uint8)
    full = len(data) // ROW_BYTES * ROW_BYTES
    table = data[:full].clone() if data.storage_offset() % 8 else data[:full]
    rows = table.view(torch.int64).view(-1, ROW_BYTES // 8)
    return rows.sum(0), rows.sum(1), data[full:]
