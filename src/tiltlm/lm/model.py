"""LanguageModel: a Hugging Face model and its tokenizer; nothing else computes sequence log-probabilities."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiltlm.errors import UsageError
from tiltlm.lm.adapters import add_lora
from tiltlm.lm.decoding import unwrapped
from tiltlm.lm.fingerprint import hash_weights
from tiltlm.lm.forward import ForwardPass
from tiltlm.lm.guide import Guide
from tiltlm.lm.limits import check_length, check_whole, start_token
from tiltlm.lm.loading import load_adapter, load_tokenizer, load_weights, resolve_device
from tiltlm.lm.memory import Memory, even_pieces
from tiltlm.lm.output_layer import plain_output_layer
from tiltlm.lm.precision import cache_dtype, cast_weights, computing, keep_cast, native_bfloat16, sparse_lookups
from tiltlm.lm.prompts import Messages, Prompts, encode_prompts
from tiltlm.lm.samples import Samples, SamplingSettings
from tiltlm.lm.sampling import generator_of, sample_batch
from tiltlm.lm.scoring_pass import causal_pass, decoder_pass
from tiltlm.lm.token_scores import logit_bias, token_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The file of a model's own guide, beside its weights.
GUIDE_FILE = "guide.safetensors"


class LanguageModel:
    """A language model that samples text and scores it under exactly the distribution that it samples from.

    ``model`` and ``tokenizer`` are the Hugging Face objects. Matrix products are computed in ``compute_dtype`` (None:
    the dtype of the weights). A completion starts after the prompt, or without a prompt after BOS (EOS for tokenizers
    without BOS). It ends with the first EOS or at the length limit. In an encoder–decoder model the encoder reads the
    prompt, and the completion starts after ``decoder_start_token_id``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "model",
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model.eval()  # with dropout, two passes over a sequence would disagree
        self.tokenizer = tokenizer
        self.name = name
        self.compute_dtype = compute_dtype
        self._fingerprint: str | None = None  # set by ``freeze``, which changes the weights
        self.guide: Guide | None = None  # part of the model's own distribution; see ``keep``
        configured = getattr(model.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        self.eos_ids = sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})
        self.is_encoder_decoder = bool(unwrapped(model).config.is_encoder_decoder)
        self.start_id = start_token(unwrapped(model), tokenizer)
        pad = tokenizer.pad_token_id
        # A pad token that only the tokenizer knows has no embedding; padding works with any other id.
        self.pad_id = pad if pad is not None and pad < self.vocab_size else (self.eos_ids or [0])[0]

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        device: str = "auto",
        dtype: str = "float32",
        peft: Mapping[str, Any] | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> LanguageModel:
        """Load ``"embedded"``, a local folder or a hub name; safetensors weights only.

        ``dtype`` is the dtype of the weights; ``auto`` means float32 weights, with products in bfloat16 on hardware
        that supports it. ``peft`` adds a LoRA adapter with these ``peft.LoraConfig`` settings. Raises ModelError if the
        model or its tokenizer cannot be loaded, UsageError for a bad device or dtype.
        """
        kwargs: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
        target = resolve_device(device)
        tokenizer = load_tokenizer(str(name), **kwargs)
        model = load_weights(str(name), dtype, **kwargs)
        compute = torch.bfloat16 if dtype == "auto" and native_bfloat16(target) else None
        loaded = cls(model.to(target), tokenizer, name=str(name), compute_dtype=compute)._with_guide_of(name)
        return loaded.with_lora(**peft) if peft is not None else loaded

    def copy(self) -> LanguageModel:
        """A copy of the model with its own weights."""
        return self._with(copy.deepcopy(self.model))

    def freeze(self) -> LanguageModel:
        """Keep the weights of linear layers only in ``compute_dtype`` from now on; returns the model.

        Its distribution and fingerprint do not change. It can no longer be trained, copied, adapted or saved.
        """
        _ = self.output_layer, self.memory  # cached before the weights change
        if self.compute_dtype is not None and self._fingerprint is None:
            self._fingerprint = hash_weights(self.model)
        keep_cast(self.model, self.compute_dtype)
        return self

    def with_lora(self, *, seed: int = 0, **settings: Any) -> LanguageModel:
        """A model on the same weights with a new LoRA adapter (``peft.LoraConfig`` settings, e.g. ``r=8``).

        ``seed`` fixes the adapter's initial values. Raises UsageError for settings that peft refuses or that would
        change the base.
        """
        model = add_lora(self.model, seed, settings, is_encoder_decoder=self.is_encoder_decoder)
        return self._with(model)

    def with_adapter(self, folder: str | os.PathLike[str]) -> LanguageModel:
        """A model on the same weights with a trained adapter. Raises ModelError if the adapter cannot be loaded."""
        return self._with(load_adapter(self.model, str(folder)))._with_guide_of(folder)

    def keep(self, guide: Guide) -> LanguageModel:
        """Make ``guide`` part of this model's distribution, also when it is saved. Returns the model."""
        self.guide = self.placed(guide)
        return self

    @contextlib.contextmanager
    def unguided(self) -> Iterator[LanguageModel]:
        """The model without its own guide, within the block."""
        kept, self.guide = self.guide, None
        try:
            yield self
        finally:
            self.guide = kept

    def _with_guide_of(self, folder: str | os.PathLike[str]) -> LanguageModel:
        path = Path(folder) / GUIDE_FILE
        return self.keep(Guide.load(path)) if path.exists() else self

    def _with(self, model: PreTrainedModel) -> LanguageModel:
        self._check_whole_weights()
        found = LanguageModel(model, self.tokenizer, name=self.name, compute_dtype=self.compute_dtype)
        found.guide = self.guide
        return found

    @property
    def device(self) -> torch.device:
        return torch.device(next(self.model.parameters()).device)

    def fingerprint(self) -> str:
        """A hash of the weights without adapters; equal for equal bases, frozen or not."""
        return self._fingerprint if self._fingerprint is not None else hash_weights(self.model)

    @property
    def has_adapter(self) -> bool:
        """Whether the model has a LoRA adapter."""
        return hasattr(self.model, "peft_config")

    def encode_prompts(
        self,
        prompts: str | Messages | Sequence[str | Messages | None] | None,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Prompts:
        """Encode prompts, left-padded. None is the empty prompt: BOS alone, or the encoder's input for "".

        The tokenizer's chat template encodes chat messages (mappings with role and content). ``columns`` hold one value
        per prompt each, which features may read. Raises UsageError for prompts that cannot be encoded.
        """
        return encode_prompts(self.tokenizer, prompts, columns, self._no_prompt, self.pad_id, self.device, self.name)

    def sample(
        self,
        n: int,
        prompts: str | Messages | Sequence[str | Messages | None] | Prompts | None = None,
        seed: int | None = None,
        *,
        max_completion_length: int = 40,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        guide: Guide | None = None,
        samples_per_prompt: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> Samples:
        """Draw ``n`` completions in all, with their log-probabilities; prompts take turns.

        A prompt's turn is ``samples_per_prompt`` completions. ``seed`` or ``generator`` fixes the draw (neither: a
        random seed). ``batch_size`` limits the rows decoded at once (None: what fits a fixed memory bound). ``guide``
        adds its logit bias before temperature, top-k and top-p. ``progress`` is called with the number drawn and
        ``n``. Raises UsageError for arguments out of range.
        """
        settings = SamplingSettings(temperature, top_k, top_p)
        for name, value, least in (("n", n, 1), ("max_completion_length", max_completion_length, 1), ("seed", seed, 0)):
            check_whole(name, value, least)
        check_whole("batch_size", batch_size, 1)
        check_whole("samples_per_prompt", samples_per_prompt, 1)
        if not isinstance(prompts, Prompts):
            prompts = self.encode_prompts(prompts)
        self.check_length(prompts, max_completion_length)
        generator = generator_of(self.device, seed, generator)
        index = torch.arange(n, device=self.device) // samples_per_prompt % len(prompts)
        guide = self.placed(guide) if guide is not None else None
        limit = batch_size or self.memory.rows_at_once(prompts.tokens.shape[1] + max_completion_length)
        parts = []
        with computing(self._inner, self.compute_dtype), cast_weights(self.model, self.compute_dtype):
            for rows in torch.split(index, -(-n // -(-n // limit))):
                tokens, mask, logprob = sample_batch(
                    self.model,
                    prompts,
                    rows,
                    max_new_tokens=max_completion_length,
                    eos_ids=torch.tensor(self.eos_ids, device=self.device, dtype=torch.long),
                    pad_id=self.pad_id,
                    start_id=self.start_id,
                    settings=settings,
                    generator=generator,
                    guide=guide if guide is not None else self.guide,
                    cache_dtype=cache_dtype(self.device, self.compute_dtype),
                )
                parts.append(Samples(tokens, mask, logprob, rows, prompts, settings, self.tokenizer, guide))
                if progress is not None:
                    progress(sum(map(len, parts)), n)
        return Samples.concatenate(parts)

    def chunks(self, samples: Samples, size: int | None = None) -> list[Tensor]:
        """Indices of the rows of ``samples``, sorted by length, in chunks whose activations fit the memory bound.

        ``size`` sets the number of rows in a chunk instead.
        """
        check_whole("batch_size", size, 1)
        order = samples.lengths.argsort(stable=True)
        if size is not None:
            return list(torch.split(order, size))
        # The input is the prompt and all sampled tokens but the last.
        lengths = (samples.lengths[order] + samples.prompts.tokens.shape[1] - 1).tolist()
        token_bytes = self.memory.logits if self.output_layer is None else self.memory.activations
        return list(torch.split(order, even_pieces(lengths, self.memory.bound // token_bytes)))

    def read(self, samples: Samples) -> ForwardPass:
        """One forward pass over ``samples``, at every sampled token, with gradient if enabled.

        ``next_token`` computes log-probabilities from it. The caller limits the number of rows; see ``chunks``.
        """
        with computing(self._inner, self.compute_dtype):
            layer = self.output_layer
            if self.is_encoder_decoder:
                hidden = decoder_pass(self.model, layer, samples, self.start_id)
            else:
                hidden = causal_pass(self.model, self._inner, layer, samples)
            at_tokens = hidden[:, -samples.tokens.shape[1] :][samples.flat_rows, samples.flat_columns]
            weight, bias = (layer.weight, layer.bias) if layer is not None else (None, None)
            return ForwardPass.of(at_tokens, weight, bias, logit_bias(samples, self.guide))

    @contextlib.contextmanager
    def cast_once(self) -> Iterator[None]:
        """Cast the weights of linear layers to ``compute_dtype`` once for all passes within the block.

        The parameters must not change in it. Gradients accumulate on ``grad`` of the parameters as usual.
        """
        _ = self.output_layer, self.memory  # cached before the weights change
        with contextlib.ExitStack() as stack:
            stack.enter_context(cast_weights(self.model, self.compute_dtype))
            if self.compute_dtype is not None and self.device.type == "cpu":
                stack.enter_context(sparse_lookups(self.model))
            yield

    def logprob(
        self, samples: Samples, *, settings: SamplingSettings | None = None, batch_size: int | None = None
    ) -> Tensor:
        """Log-probability [N, T] of each sampled token in nats, 0 where masked; sum over T for sequences.

        The settings and guide are those of ``samples``; with other ``settings``, their guide is left out. The passes
        run in chunks (``batch_size`` rows, or a memory bound). Except under ``torch.no_grad()`` the result carries a
        gradient.
        """
        if not len(samples):
            return torch.zeros_like(samples.proposal_logprob)
        guide = self.placed(samples.guide) if settings is None and samples.guide is not None else None
        parts, chunks = [], self.chunks(samples, batch_size)
        width = samples.tokens.shape[1]
        with contextlib.nullcontext() if torch.is_grad_enabled() else self.cast_once():
            for rows in chunks:
                chunk = samples.select(rows).trimmed()
                scores = token_logprobs(chunk, self.read(chunk), settings or samples.settings, guide)
                parts.append(torch.nn.functional.pad(scores, (0, width - scores.shape[1])))
        return torch.cat(parts)[torch.cat(chunks).argsort()]

    def sequence_logprob(self, samples: Samples) -> Tensor:
        """Log-probability [N] of each completion, float64 on the CPU, without the settings and guide of ``samples``."""
        return self.logprob(samples, settings=SamplingSettings()).double().sum(-1).cpu()

    @cached_property
    def output_layer(self) -> torch.nn.Linear | None:
        """The linear layer that maps hidden states to logits; None if the model does more than that."""
        return plain_output_layer(self._inner, [self.start_id, self.pad_id])

    @property
    def _no_prompt(self) -> list[int]:
        """The tokens of an empty prompt."""
        if not self.is_encoder_decoder:
            return [int(self.start_id)]
        return [int(i) for i in self.tokenizer("")["input_ids"]] or [(self.eos_ids or [self.pad_id])[0]]

    @property
    def _inner(self) -> PreTrainedModel:
        """The model without its PEFT wrapper."""
        return unwrapped(self.model)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a Hugging Face checkpoint or a PEFT adapter, the tokenizer and the guide, as safetensors."""
        self._check_whole_weights()
        # The proposal's adapter is not part of the tuned model.
        adapters = {"selected_adapters": ["default"]} if self.has_adapter else {}
        self.model.save_pretrained(folder, **adapters)
        self.tokenizer.save_pretrained(folder)
        if self.guide is not None:
            self.guide.save(Path(folder) / GUIDE_FILE)

    def placed(self, guide: Guide) -> Guide:
        """The guide on the model's device, in float64 for float64 weights, else in float32."""
        precise = next(self.model.parameters()).dtype == torch.float64
        return guide.to(self.device, torch.float64 if precise else torch.float32)

    def _check_whole_weights(self) -> None:
        if self._fingerprint is not None:
            raise UsageError(
                f"model: '{self.name}' is a frozen base, which has some of its weights in {self.compute_dtype} only; "
                f"load it again to copy, adapt or save it"
            )

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @cached_property
    def memory(self) -> Memory:
        """The memory that passes over the model need."""
        return Memory.of(self.model, narrow=self.compute_dtype is not None)

    def check_length(self, prompts: Prompts, completion: int) -> None:
        """Raise UsageError, which names the longest prompt, if the model has too few positions."""
        config = self.model.config.get_text_config()
        check_length(config, prompts, completion, name=self.name, is_encoder_decoder=self.is_encoder_decoder)
