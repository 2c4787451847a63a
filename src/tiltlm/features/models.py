"""Transformers models for features: loaded once, run on batches of texts of similar length."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiltlm.errors import ModelError, UsageError, nearest, why_not_loaded
from tiltlm.features.batch import Batch
from tiltlm.features.fields import READS, check_reads, input_texts, prompt_texts

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLASSIFICATION = "AutoModelForSequenceClassification"
PAIR_READS = (*READS, "pair", "chat")
EMBEDDED = Path(__file__).parents[1] / "lm" / "embedded_model"
# The tokenized text, by the tokenizer's names: input_ids, attention_mask, token_type_ids.
Row = dict[str, list[int]]
# From the model's outputs on B texts and the inputs [B, T] to a tensor [B, ...].
Head = Callable[[Any, dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class TextModel:
    """The model of a feature, with its run-file settings. Its weights are loaded on first use.

    ``feature`` is the kind, for errors; ``auto_class`` is the transformers class that loads the model. Raises
    UsageError for invalid settings, ModelError if the model does not exist.
    """

    feature: str
    auto_class: str
    name: str
    reads: str = "completion"
    batch_size: int = 32
    max_length: int | None = None
    device: str = "auto"
    dtype: str = "float32"
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        name, where = self.name, self.feature
        if not isinstance(name, str | Path) or not str(name).strip():
            raise UsageError(f"{where}.model: expected a folder or a name on the hub, got {name!r}")
        check_reads(where, self.reads, PAIR_READS if self.auto_class == CLASSIFICATION else READS)
        for option, value in (("batch_size", self.batch_size), ("max_length", self.max_length)):
            whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
            if not whole and (option == "batch_size" or value is not None):
                raise UsageError(f"{where}.{option}: expected a whole number above 0, got {value!r}")
        if self.dtype not in DTYPES:
            raise UsageError(f"{where}.dtype: {self.dtype!r} is not known; {nearest(str(self.dtype), DTYPES)}")
        if not isinstance(self.trust_remote_code, bool):
            raise UsageError(f"{where}.trust_remote_code: expected true or false, got {self.trust_remote_code!r}")
        object.__setattr__(self, "name", str(name))
        _device(where, self.device)
        positions = _positions(self.config)
        if self.max_length and positions and self.max_length > positions:
            raise UsageError(
                f"{where}.max_length: {self.max_length} is too long for '{name}'; give at most {positions} tokens"
            )

    @property
    def short_name(self) -> str:
        """The last part of the model's name, for names of features."""
        return Path(self.name).name

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration. The weights are not loaded. Raises ModelError."""
        return _config(self.feature, self._source, self.revision, self.trust_remote_code)

    @property
    def loaded(self) -> LoadedModel:
        """The model with its tokenizer, shared by all features that name it. Raises ModelError."""
        device = str(_device(self.feature, self.device))
        with LOADING:
            return _load(
                self.feature,
                self.auto_class,
                self._source,
                device,
                self.dtype,
                self.revision,
                self.trust_remote_code,
            )

    def measure(self, batch: Batch, head: Head) -> Tensor:
        """``head`` of the model's outputs on each input of the batch: float64 [N, ...] on the CPU."""
        return self.loaded.measure(self._rows(batch), self.batch_size, head)

    def _rows(self, batch: Batch) -> list[Row]:
        encode = self.loaded.encode
        if self.reads == "pair":
            return encode(prompt_texts(batch), list(batch.texts), max_length=self.max_length)
        if self.reads == "chat":
            # The template adds the special tokens.
            chats = [self._chat(batch, row) for row in range(len(batch))]
            return encode(chats, max_length=self.max_length, add_special_tokens=False)
        return encode(input_texts(batch, self.reads), max_length=self.max_length)

    def _chat(self, batch: Batch, row: int) -> str:
        """Prompt and completion in the tokenizer's chat template. Raises ModelError if it has none."""
        given = batch.messages[row] if batch.messages is not None else None
        messages = [{"role": "user", "content": prompt_texts(batch)[row]}] if given is None else list(given)
        tokenizer = self.loaded.tokenizer
        if not tokenizer.chat_template:
            raise ModelError(f"{self.feature}: the tokenizer of '{self.name}' has no chat template; use reads: text")
        answer = {"role": "assistant", "content": batch.texts[row]}
        return str(tokenizer.apply_chat_template([*messages, answer], tokenize=False))

    @property
    def _source(self) -> str:
        if self.name == "embedded":
            return str(EMBEDDED)
        folder = Path(self.name).expanduser()
        return str(folder.resolve()) if folder.exists() else self.name


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in evaluation mode on its device, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def start(self) -> int:
        """The token that stands for a text without tokens."""
        tokenizer = self.tokenizer
        candidates = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.pad_token_id)
        return next((int(token) for token in candidates if token is not None), 0)

    @cached_property
    def max_tokens(self) -> int | None:
        """The length limit in tokens; None if neither model nor tokenizer has one."""
        limits = [limit for limit in (self.tokenizer.model_max_length, _positions(self.model.config)) if limit]
        most = min(limits, default=None)
        return None if most is None or most > 10**9 else int(most)

    def encode(
        self,
        texts: list[str],
        pairs: list[str] | None = None,
        *,
        max_length: int | None = None,
        add_special_tokens: bool = True,
    ) -> list[Row]:
        """One tokenized row per text, cut at ``max_length`` and at the model's limit."""
        if not texts:
            return []
        longest = min((limit for limit in (max_length, self.max_tokens) if limit is not None), default=None)
        found = self.tokenizer(
            texts,
            pairs,
            truncation=longest is not None,
            max_length=longest,
            add_special_tokens=add_special_tokens,
        )
        rows = [{key: list(found[key][i]) for key in found} for i in range(len(texts))]
        return [row if row["input_ids"] else {"input_ids": [self.start], "attention_mask": [1]} for row in rows]

    def measure(self, rows: Sequence[Row], batch_size: int, head: Head) -> Tensor:
        """``head`` of the outputs, in the order of the rows: float64 [N, ...]. Batches hold rows of similar length.

        Entries of a row that the model does not accept go to the head only.
        """
        known = inspect.signature(self.model.forward).parameters
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]))
        parts = []
        for start in range(0, len(order), batch_size):
            inputs = self._padded([rows[row] for row in order[start : start + batch_size]])
            with torch.inference_mode():
                outputs = self.model(**{key: value for key, value in inputs.items() if key in known})
                parts.append(head(outputs, inputs).cpu().double())
        if not parts:
            return torch.empty(0, dtype=torch.float64)
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        return torch.cat(parts)[back]

    def _padded(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Rows as right-padded tensors [B, T] on the model's device."""
        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.pad}
        return {
            key: torch.tensor(
                [row.get(key, []) + [fill.get(key, 0)] * (width - len(row.get(key, []))) for row in rows],
                device=self.model.device,
            )
            for key in dict.fromkeys(key for row in rows for key in row)
        }

    @cached_property
    def pad(self) -> int:
        """The id of the model's padding token."""
        return int(self.model.config.get_text_config().pad_token_id)


def _positions(config: PretrainedConfig) -> int | None:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(positions) if positions and positions > 0 else None


def _device(feature: str, device: str) -> torch.device:
    """The device; ``auto`` is CUDA, else Apple's MPS, else the CPU. Raises UsageError for a missing device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{feature}.device: '{device}' cannot be used here ({reason}); try auto or cpu") from error
    return found


# Several threads measure features, and no model may be loaded twice.
LOADING = threading.RLock()


@cache
def _config(feature: str, source: str, revision: str | None, trust_remote_code: bool) -> PretrainedConfig:
    from transformers import AutoConfig

    with _explained(feature, source):
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)


@cache
def _load(
    feature: str,
    auto_class: str,
    source: str,
    device: str,
    dtype: str,
    revision: str | None,
    trust_remote_code: bool,
) -> LoadedModel:
    import transformers

    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _explained(feature, source):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        # For a folder without tokenizer files transformers may build one that knows no word.
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ValueError("there are no tokenizer files (tokenizer.json, tokenizer.model, vocab.json ...)")
        model, info = getattr(transformers, auto_class).from_pretrained(
            source,
            dtype=DTYPES[dtype],
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, not only in the log
            **options,
        )
        for key, stored, wanted in sorted(info["mismatched_keys"]):
            raise ValueError(f"its weight {key} has shape {tuple(stored)}, but config.json gives {tuple(wanted)}")
        # transformers initializes missing weights at random. Without a head, the pooler is not used.
        headless = auto_class == "AutoModel"
        missing = sorted(key for key in info["missing_keys"] if not (headless and key.startswith("pooler.")))
        if missing:
            raise ValueError(f"{len(missing)} weights of {type(model).__name__} are missing ({missing[0]}, …)")
    text_config = model.config.get_text_config()
    if text_config.pad_token_id is None:
        spare = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        text_config.pad_token_id = next(token for token in spare if token is not None)
    return LoadedModel(model.eval().requires_grad_(False).to(device), tokenizer)


@contextlib.contextmanager
def _explained(feature: str, source: str) -> Iterator[None]:
    """Turn any error of transformers, tokenizers or safetensors about a missing or broken model into a ModelError."""
    try:
        yield
    except (ModelError, UsageError):
        raise
    except Exception as error:
        where, reason = why_not_loaded(source, error)
        if not Path(source).exists() and (source.count("/") > 1 or source.startswith((".", "~", "/"))):
            reason = "there is no such folder"
        if "trust_remote_code" in str(error):
            reason = "the model has its own code, which runs only with trust_remote_code: true"
        raise ModelError(
            f"{feature}.model: no such model could be loaded from '{source}' ({where}): {reason}. "
            f"Give a folder saved by save_pretrained (safetensors and tokenizer), or a hub name."
        ) from error
