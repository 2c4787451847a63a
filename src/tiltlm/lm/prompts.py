"""Prompts as tokens, encoded from text or chat messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiltlm.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Prompts:
    """M tokenized prompts, left-padded: ``tokens`` [M, L], ``mask`` [M, L] and ``texts`` (None: no prompt).

    ``messages`` are the chat messages of a prompt, None for a plain text. ``columns`` hold M values each, which
    features may read. ``ids`` are the positions of the prompts in the full list; ``select`` keeps them.
    """

    tokens: Tensor
    mask: Tensor
    texts: tuple[str | None, ...]
    messages: tuple[Messages | None, ...] | None = None
    columns: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.ids:
            object.__setattr__(self, "ids", tuple(range(len(self.texts))))

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def ragged(self) -> bool:
        """Whether any prompt is padded."""
        return not bool(self.mask.all())

    @property
    def lengths(self) -> Tensor:
        """Number of tokens [M] without padding."""
        return self.mask.sum(-1)

    def fair_order(self, n: int, seed: int, each: int = 1) -> Tensor:
        """An order [M] of the prompts for ``n`` samples that take them in turn, ``each`` samples of a prompt at a time.

        If ``n`` uses all prompts equally often, the order is unchanged. Otherwise ``seed`` shuffles it, so that the
        first prompts are not always the ones with more samples.
        """
        count = len(self.texts)
        if n % (count * each) == 0:
            return torch.arange(count)
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed))

    def select(self, order: Tensor | Sequence[int]) -> Prompts:
        """The prompts at the positions ``order``, in this order, without padding that all of them share."""
        indices = [int(i) for i in order]
        rows = torch.tensor(indices, dtype=torch.long, device=self.tokens.device)
        used = self.mask[rows].any(0)
        return Prompts(
            self.tokens[rows][:, used],
            self.mask[rows][:, used],
            tuple(self.texts[i] for i in indices),
            tuple(self.messages[i] for i in indices) if self.messages is not None else None,
            {name: tuple(values[i] for i in indices) for name, values in self.columns.items()},
            tuple(self.ids[i] for i in indices),
        )


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    given: Any,
    columns: Mapping[str, Sequence[Any]] | None,
    no_prompt: list[int],
    pad_id: int,
    device: torch.device,
    name: str,
) -> Prompts:
    """Encode one or several prompts, left-padded; ``no_prompt`` are the tokens of an empty prompt.

    ``columns`` hold one value per prompt each. Raises UsageError if the tokenizer of the model ``name`` cannot encode a
    prompt, or a column has the wrong length.
    """
    listed = prompt_list(given)
    rows = [encode(tokenizer, prompt, row, name) or no_prompt for row, prompt in enumerate(listed, 1)]
    for column, values in (columns or {}).items():
        if len(values) != len(rows):
            raise UsageError(f"columns: '{column}' has {len(values)} values for {len(rows)} prompts")
    width = max(map(len, rows))
    chats = tuple(None if prompt is None or isinstance(prompt, str) else prompt for prompt in listed)
    return Prompts(
        torch.tensor([[pad_id] * (width - len(row)) + row for row in rows], device=device),
        torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device).bool(),
        tuple(map(text_of, listed)),
        chats if any(chats) else None,
        {column: tuple(values) for column, values in (columns or {}).items()},
    )


def prompt_list(given: Any) -> list[str | Messages | None]:
    """One or several prompts as a list. Raises UsageError for anything but text and chat messages."""
    listed: list[Any] = [given] if given is None or isinstance(given, str) or _are_messages(given) else []
    if not listed:
        if not isinstance(given, Iterable) or isinstance(given, Mapping):
            raise UsageError(f"prompts: {given!r:.60} is no text; give a string, chat messages, or a list of these")
        listed = [*given]
    if not listed:
        raise UsageError("prompts: the list is empty; leave prompts out to sample from BOS")
    for prompt in listed:
        if not (prompt is None or isinstance(prompt, str) or _are_messages(prompt)):
            raise UsageError(f"prompts: {prompt!r:.60} is no text; give a string, chat messages, or a list of these")
    return listed


def _are_messages(given: Any) -> bool:
    return (
        isinstance(given, Sequence)
        and not isinstance(given, str)
        and len(given) > 0
        and all(isinstance(message, Mapping) and isinstance(message.get("content"), str) for message in given)
    )


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str | Messages | None, row: int, name: str) -> list[int]:
    """The tokens of a prompt; a chat template encodes chat messages up to where the answer begins.

    Raises UsageError, which names ``row``, if the tokenizer of the model ``name`` cannot encode the prompt.
    """
    if not prompt:
        return []
    found = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else _encode_chat(tokenizer, prompt, row, name)
    return [int(i) for i in found]


def _encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Messages, row: int, name: str) -> Sequence[int]:
    if tokenizer.chat_template is None:
        raise UsageError(
            f"prompts: prompt {row} is chat messages, but the tokenizer of '{name}' has no chat template; give it as "
            f"text, or use a model that is tuned for chat"
        )
    # A last message of the assistant is the beginning of the answer, which the completion continues.
    begun = messages[-1].get("role") == "assistant"
    try:
        encoded = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=not begun,
            continue_final_message=begun,
            return_dict=True,
        )
    except Exception as error:
        raise UsageError(
            f"prompts: the chat template of '{name}' refuses prompt {row}: {type(error).__name__}: {error}"
        ) from error
    found: Sequence[int] = encoded["input_ids"]
    return found


def text_of(prompt: str | Messages | None) -> str | None:
    """A prompt as text; the contents of chat messages on a line each."""
    return prompt if prompt is None or isinstance(prompt, str) else "\n".join(m["content"] for m in prompt)
