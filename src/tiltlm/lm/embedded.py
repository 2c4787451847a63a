"""The language model that ships inside the package, trained by ``scripts/pretrain_embedded.py``."""

from __future__ import annotations

from pathlib import Path

EMBEDDED = "embedded"


def embedded_path() -> Path:
    """The folder of the embedded model: a plain Hugging Face checkpoint with its model card."""
    return Path(__file__).parent / "embedded_model"
