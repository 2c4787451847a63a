"""The perplexity of a text under another language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy

from tiltlm.errors import ModelError, UsageError, nearest
from tiltlm.features.batch import Batch
from tiltlm.features.feature import Feature
from tiltlm.features.fields import prompt_texts
from tiltlm.features.kinds import feature_kind
from tiltlm.features.models import LoadedModel, Row, TextModel

VALUES = ("perplexity", "logprob")


@dataclass(frozen=True, kw_only=True)
class Perplexity(Feature):
    """The perplexity of a text under a causal language model, or the mean log-probability of its tokens."""

    model: TextModel
    value: str

    def compute(self, batch: Batch) -> Tensor:
        loaded = self.model.loaded
        prompts = prompt_texts(batch) if self.model.reads == "text" else [""] * len(batch)
        rows = _rows(loaded, prompts, list(batch.texts), self.model)
        logprob = loaded.measure(rows, self.model.batch_size, _mean_logprob).reshape(len(batch))
        return logprob if self.value == "logprob" else (-logprob).exp()


@feature_kind("perplexity")
def perplexity(
    model: str,
    value: str = "perplexity",
    reads: str = "completion",
    batch_size: int = 16,
    max_length: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Perplexity:
    """The perplexity of the completion under a causal language model: exp of minus the mean log-probability of a token.

    ``value="logprob"`` is the mean itself, in nats; it has no heavy tail. The completion follows the start token and,
    with ``reads="text"``, the prompt. Only the tokens of the completion are scored; of an empty one, the end
    token. Beyond ``max_length`` tokens, the first tokens of the prompt are dropped, then the last ones of the
    completion. ``model`` may be ``embedded``; the other settings are those of ``classifier``. Raises ModelError if the
    model cannot be loaded, UsageError for invalid settings.
    """
    if value not in VALUES:
        raise UsageError(f"perplexity.value: {value!r} is not known; {nearest(str(value), VALUES)}")
    found = TextModel(
        "perplexity",
        "AutoModelForCausalLM",
        model,
        reads,
        batch_size,
        max_length,
        device,
        dtype,
        revision,
        trust_remote_code,
    )
    what = "perplexity" if value == "perplexity" else "log-probability"
    return Perplexity(name=f"{what} under {found.short_name}", binary=False, model=found, value=value)


def _rows(loaded: LoadedModel, prompts: list[str], completions: list[str], model: TextModel) -> list[Row]:
    """Start token, prompt and completion of each row; ``scored`` marks the tokens of the completion."""
    tokenizer = loaded.tokenizer
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if start is None and end is None:
        raise ModelError(f"perplexity.model: the tokenizer of '{model.name}' has neither a BOS nor an EOS token")
    start, end = (end if start is None else start), (start if end is None else end)
    limits = [limit for limit in (model.max_length, loaded.max_tokens) if limit is not None]
    room = max(min(limits, default=10**9) - 1, 1)
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        scored = _ids(loaded, completion)[:room] or [end]
        before = _ids(loaded, prompt)
        before = before[max(len(before) - (room - len(scored)), 0) :]
        ids = [start, *before, *scored]
        marks = [0] * (len(ids) - len(scored)) + [1] * len(scored)
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "scored": marks})
    return rows


def _ids(loaded: LoadedModel, text: str) -> list[int]:
    return list(loaded.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _mean_logprob(outputs: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The mean log-probability [B], in nats, of the scored tokens given all before them."""
    scored = inputs["scored"][:, 1:].bool()
    wanted = inputs["input_ids"][:, 1:].masked_fill(~scored, -100)
    losses = cross_entropy(outputs.logits[:, :-1].float().transpose(1, 2), wanted, ignore_index=-100, reduction="none")
    return -losses.sum(1) / scored.sum(1)
