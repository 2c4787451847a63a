"""The models of the benchmarks: the embedded one, and GPT-2 shapes with random weights."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

EMBEDDED = "embedded"


@dataclass(frozen=True)
class Shape:
    """The shape of a GPT-2."""

    vocabulary: int
    hidden: int
    layers: int
    positions: int = 1024


# GPT2Config's default: 124M parameters.
GPT2 = Shape(50257, 768, 12)
GPT2_XL = Shape(50257, 1600, 48)
TINY = Shape(300, 32, 2, positions=64)
SHAPES = {"gpt2": GPT2, "gpt2-xl": GPT2_XL, "tiny": TINY}


@dataclass(frozen=True)
class Case:
    """A model and the number of sequences per batch, written ``gpt2:32``."""

    model: str
    n: int

    @staticmethod
    def parse(text: str) -> Case:
        model, _, n = text.partition(":")
        if model not in (EMBEDDED, *SHAPES) or not n.isdigit():
            raise argparse.ArgumentTypeError(f"{text!r}: write MODEL:SEQUENCES, with {EMBEDDED}, {', '.join(SHAPES)}")
        return Case(model, int(n))

    def __str__(self) -> str:
        names = {
            EMBEDDED: "embedded model",
            "gpt2": "GPT-2 124M shape",
            "gpt2-xl": "GPT-2 1.5B shape",
            "tiny": "a tiny model",
        }
        return f"{names[self.model]}, {self.n} sequences"


def add_cases(parser: argparse.ArgumentParser, *cases: str) -> None:
    """Add the options ``--case``, with these defaults, and ``--length``."""
    parser.add_argument(
        "--case",
        type=Case.parse,
        nargs="+",
        metavar="MODEL:SEQUENCES",
        default=[Case.parse(case) for case in cases],
        help=f"embedded, gpt2 or gpt2-xl, with the number of sequences per batch ({' '.join(cases) or 'by device'})",
    )
    parser.add_argument("--length", type=int, default=40, help="tokens of a completion at most (40)")


@contextlib.contextmanager
def folder_of(model: str | Shape) -> Iterator[str]:
    """A folder with this model and its tokenizer in the format of transformers."""
    from tiltlm.lm.embedded import embedded_path

    if model == EMBEDDED:
        yield str(embedded_path())
        return
    with tempfile.TemporaryDirectory(prefix="tiltlm-bench-") as folder:
        save_random_model(SHAPES[model] if isinstance(model, str) else model, Path(folder))
        yield folder


def save_random_model(shape: Shape, folder: Path) -> None:
    """Save a GPT-2 with random weights and without dropout, whose completions all have the maximum length.

    The EOS of the tokenizer is a token that the model does not have, so no side can draw it and lengths are equal.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    words = {"<bos>": 0} | {_word(i): i for i in range(1, shape.vocabulary)} | {"<never>": shape.vocabulary}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<bos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", pad_token="<bos>", eos_token="<never>", padding_side="left"
    )
    fast.save_pretrained(folder)
    config = GPT2Config(
        vocab_size=shape.vocabulary,
        n_positions=shape.positions,
        n_embd=shape.hidden,
        n_layer=shape.layers,
        n_head=max(1, shape.hidden // 64),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder)


def _word(number: int) -> str:
    """A pseudo-word for a token: its number in base 26, in letters."""
    letters = ""
    while number:
        number, digit = divmod(number, 26)
        letters = chr(ord("a") + digit) + letters
    return letters
