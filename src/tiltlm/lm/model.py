"""LanguageModel: a Hugging Face model and tokenizer, and the only place that computes sequence log-probabilities."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tiltlm.errors import ModelError, UsageError
from tiltlm.lm.cross import Source, decoder_states
from tiltlm.lm.decoding import accepts, positions, unwrapped
from tiltlm.lm.fingerprint import fingerprint
from tiltlm.lm.forward import ForwardPass, token_logprobs
from tiltlm.lm.guide import Guide
from tiltlm.lm.loading import load_adapter, load_tokenizer, load_weights, quiet_peft, resolve_device
from tiltlm.lm.memory import Memory, even_pieces
from tiltlm.lm.output_layer import plain_output_layer
from tiltlm.lm.precision import cache_dtype, cast_weights, computing, keep_cast, native_bfloat16, sparse_lookups
from tiltlm.lm.prompts import Messages, Prompts, encode, prompt_list, text_of
from tiltlm.lm.samples import Samples, SamplingSettings
from tiltlm.lm.sampling import sample_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What a model's own guide is called beside its weights.
GUIDE_FILE = "guide.safetensors"

# Settings of LoRA whose other values change the weights, or the layers, that the base would share.
HARMLESS_TO_THE_BASE: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "layer_replication": (None,),
}


class LanguageModel:
    """A language model that samples text and scores it under exactly the law that it samples from.

    ``model`` and ``tokenizer`` are the Hugging Face objects; matrix products are taken in ``compute_dtype``, or in the
    dtype of the weights if it is None. A completion starts after BOS (or EOS, for tokenizers without BOS) or after a
    prompt, and ends with the first EOS or at the length limit. Of an encoder–decoder model the encoder reads the
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
        self.model = model.eval()  # dropout would make two passes over one sequence disagree
        self.tokenizer = tokenizer
        self.name = name
        self.compute_dtype = compute_dtype
        self.fingerprint: str | None = None  # where the weights no longer tell it
        self.guide: Guide | None = None  # a guide that is part of the model's own law; see keep
        configured = getattr(model.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        self.eos_ids = sorted({i for i in [*ids, tokenizer.eos_token_id] if i is not None})
        self.is_encoder_decoder = bool(unwrapped(model).config.is_encoder_decoder)
        self.start_id = _start_id(unwrapped(model), tokenizer)
        pad = tokenizer.pad_token_id
        # A pad token that was added to the tokenizer alone has no embedding; any other id pads as well.
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

        ``peft`` adds a LoRA adapter with these ``peft.LoraConfig`` settings; ``dtype`` is the dtype of the weights, and
        ``auto`` float32 weights with products in bfloat16 where the hardware multiplies it natively.
        Raises ModelError when the model or its tokenizer cannot be loaded, UsageError for a bad device or dtype.
        """
        kwargs: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
        target = resolve_device(device)
        tokenizer = load_tokenizer(str(name), **kwargs)
        model = load_weights(str(name), dtype, **kwargs)
        compute = torch.bfloat16 if dtype == "auto" and native_bfloat16(target) else None
        loaded = cls(model.to(target), tokenizer, name=str(name), compute_dtype=compute)._with_guide_of(name)
        return loaded.with_lora(**peft) if peft is not None else loaded

    def copy(self) -> LanguageModel:
        """The same model in memory of its own."""
        return self._with(copy.deepcopy(self.model))

    def freeze(self) -> LanguageModel:
        """Make this a model that is only read, and keep in ``compute_dtype`` alone what is only read in it; returns it.

        Its law and its fingerprint stay what they are. It cannot be copied, adapted or saved any more.
        """
        _ = self.output_layer, self.memory  # are found with the weights as they are
        if self.compute_dtype is not None and self.fingerprint is None:
            self.fingerprint = fingerprint(self)
        keep_cast(self.model, self.compute_dtype)
        return self

    def with_lora(self, *, seed: int = 0, **settings: Any) -> LanguageModel:
        """The same weights, held once, with a fresh LoRA adapter (``peft.LoraConfig`` settings, e.g. ``r=8``).

        ``seed`` fixes the adapter's random start. Raises UsageError for settings that peft refuses, and for trained
        biases, which the base would share.
        """
        from peft import LoraConfig, get_peft_model

        for name, harmless in HARMLESS_TO_THE_BASE.items():
            if settings.get(name, harmless[0]) not in harmless:
                choices = " or ".join(map(repr, harmless))
                raise UsageError(f"peft.{name}: {settings[name]!r} would change the base model too; choose {choices}")
        try:
            with quiet_peft(), torch.random.fork_rng():
                torch.manual_seed(seed)
                task = "SEQ_2_SEQ_LM" if self.is_encoder_decoder else "CAUSAL_LM"
                config = LoraConfig(task_type=task, **settings)
                model = get_peft_model(self.model, config)
        except (TypeError, ValueError) as error:
            raise UsageError(f"peft: LoRA with {settings} was refused: {error}") from error
        return self._with(model)

    def with_adapter(self, folder: str | os.PathLike[str]) -> LanguageModel:
        """The same weights with a trained adapter from a folder. Raises ModelError when it cannot be loaded."""
        return self._with(load_adapter(self.model, str(folder)))._with_guide_of(folder)

    def keep(self, guide: Guide) -> LanguageModel:
        """Make a guide part of this model's law, in sampling and in scoring; it is saved with it. Returns the model."""
        self.guide = self.placed(guide)
        return self

    @contextlib.contextmanager
    def unguided(self) -> Iterator[LanguageModel]:
        """The model without a guide of its own, for the length of the block."""
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

    @property
    def has_adapter(self) -> bool:
        """Whether a LoRA adapter sits on the weights."""
        return hasattr(self.model, "peft_config")

    def encode_prompts(
        self,
        prompts: str | Messages | Sequence[str | Messages | None] | None,
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Prompts:
        """Tokenize prompts, left-padded; None is the one empty prompt: just BOS, or what an encoder is given for "".

        Chat messages, mappings with role and content, are encoded by the tokenizer's chat template. ``columns`` hold
        one further value per prompt each, which features may read. Raises UsageError for what cannot be encoded.
        """
        listed = prompt_list(prompts)
        encoded = (encode(self.tokenizer, prompt, row, self.name) for row, prompt in enumerate(listed, 1))
        rows = [row or self._no_prompt for row in encoded]
        for name, values in (columns or {}).items():
            if len(values) != len(rows):
                raise UsageError(f"columns: '{name}' has {len(values)} values for {len(rows)} prompts")
        width = max(map(len, rows))
        chats = tuple(None if prompt is None or isinstance(prompt, str) else prompt for prompt in listed)
        return Prompts(
            torch.tensor([[self.pad_id] * (width - len(row)) + row for row in rows], device=self.device),
            torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.device).bool(),
            tuple(map(text_of, listed)),
            chats if any(chats) else None,
            {name: tuple(values) for name, values in (columns or {}).items()},
        )

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
        """Draw ``n`` completions in all, the prompts taken in turn, with their log-probabilities.

        ``samples_per_prompt`` of each are drawn before it is the next one's turn.
        ``seed`` or ``generator`` fixes the draw (neither: a fresh seed); ``batch_size`` limits the rows decoded at
        once (default: what fits a fixed memory bound); ``guide`` reweights each next token, before the law's settings;
        ``progress`` is told the number drawn so far and ``n``. Raises UsageError for settings out of range.
        """
        settings = SamplingSettings(temperature, top_k, top_p)
        for name, value, least in (("n", n, 1), ("max_completion_length", max_completion_length, 1), ("seed", seed, 0)):
            _check_whole(name, value, least)
        _check_whole("batch_size", batch_size, 1)
        _check_whole("samples_per_prompt", samples_per_prompt, 1)
        if not isinstance(prompts, Prompts):
            prompts = self.encode_prompts(prompts)
        self.check_length(prompts, max_completion_length)
        if generator is None:
            generator = torch.Generator(self.device)
            generator.seed() if seed is None else generator.manual_seed(seed)
        elif seed is not None:
            raise UsageError(f"seed: {seed} and a generator were both given; give one of them")
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
        """Row indices of ``samples``, like lengths together, in pieces whose activations fit the memory bound.

        ``size`` sets the number of rows of a piece instead.
        """
        _check_whole("batch_size", size, 1)
        order = samples.lengths.argsort(stable=True)
        if size is not None:
            return list(torch.split(order, size))
        # The last sampled token is not read, the prompt is.
        lengths = (samples.lengths[order] + samples.prompts.tokens.shape[1] - 1).tolist()
        return list(torch.split(order, even_pieces(lengths, self.memory.bound // self._token_bytes)))

    def read(self, samples: Samples) -> ForwardPass:
        """One pass over ``samples``: what the model makes of every sampled position, with gradient if enabled.

        For one chunk at a time: the caller bounds N. ``next_token`` makes log-probabilities of it.
        """
        with computing(self._inner, self.compute_dtype):
            read, layer = self._read_crossing(samples) if self.is_encoder_decoder else self._read_on(samples)
            last = read[:, -samples.tokens.shape[1] :][samples.flat_rows, samples.flat_columns]
            own = self.guide
            lift = own.lift(samples.tokens, samples.flat_rows, samples.flat_columns) if own is not None else None
            weight, bias = (layer.weight, layer.bias) if layer is not None else (None, None)
            return ForwardPass.of(last, weight, bias, lift)

    def _read_on(self, samples: Samples) -> tuple[Tensor, torch.nn.Linear | None]:
        """Hidden states of prompt and completion and the layer after them, or logits and None."""
        tokens, mask = samples.prompts.tokens[samples.prompt_index], samples.prompts.mask[samples.prompt_index]
        arguments: dict[str, Any] = {
            "input_ids": torch.cat([tokens, samples.tokens[:, :-1]], dim=1),
            "use_cache": False,
        }
        if not bool(mask.all()):
            # The right padding is never attended to by a sampled token, so only the left one is masked.
            full = torch.cat([mask, torch.ones_like(samples.mask[:, :-1])], dim=1)
            arguments["attention_mask"] = full.long()
            if accepts(self.model, "position_ids"):
                arguments["position_ids"] = positions(full)
        layer = self.output_layer
        if layer is not None:
            return self._inner.base_model(**arguments).last_hidden_state, layer
        if accepts(self.model, "logits_to_keep"):
            arguments["logits_to_keep"] = samples.tokens.shape[1]
        return self.model(**arguments).logits, None

    def _read_crossing(self, samples: Samples) -> tuple[Tensor, torch.nn.Linear | None]:
        """The same of the completion alone, where an encoder reads the prompt."""
        start = torch.full_like(samples.tokens[:, :1], self.start_id)
        tokens = torch.cat([start, samples.tokens[:, :-1]], dim=1)
        layer, source = self.output_layer, Source.of(self.model, samples.prompts, samples.prompt_index)
        if layer is not None:
            return decoder_states(self.model, tokens, source), layer
        return self.model(decoder_input_ids=tokens, use_cache=False, **source.arguments).logits, None

    @contextlib.contextmanager
    def cast_once(self) -> Iterator[None]:
        """Hold the weights of linear layers in ``compute_dtype`` for the length of the block, for many passes.

        The parameters must not change in it. Gradients accumulate on ``grad`` of the parameters as ever.
        """
        _ = self.output_layer, self.memory  # are found with the weights as they are
        with contextlib.ExitStack() as held:
            held.enter_context(cast_weights(self.model, self.compute_dtype))
            if self.compute_dtype is not None and self.device.type == "cpu":
                held.enter_context(sparse_lookups(self.model))
            yield

    def logprob(
        self, samples: Samples, *, settings: SamplingSettings | None = None, batch_size: int | None = None
    ) -> Tensor:
        """Log-probability of each sampled token [N, T] in nats, 0 where masked, under the law that drew ``samples``.

        Other ``settings`` may be given, unguided then. Sum over the last axis for sequences. Runs in chunks of bounded
        memory; under ``torch.no_grad()`` nothing is kept, otherwise the result carries a gradient.
        """
        if not len(samples):
            return torch.zeros_like(samples.proposal_logprob)
        guide = self.placed(samples.guide) if settings is None and samples.guide is not None else None
        pieces, order = [], self.chunks(samples, batch_size)
        width = samples.tokens.shape[1]
        with contextlib.nullcontext() if torch.is_grad_enabled() else self.cast_once():
            for rows in order:
                chunk = samples.select(rows).trimmed()
                scores = token_logprobs(chunk, self.read(chunk), settings or samples.settings, guide)
                pieces.append(torch.nn.functional.pad(scores, (0, width - scores.shape[1])))
        return torch.cat(pieces)[torch.cat(order).argsort()]

    @cached_property
    def output_layer(self) -> torch.nn.Linear | None:
        """The layer that makes logits of hidden states, where that is all that the model does with them."""
        return plain_output_layer(self._inner, [self.start_id, self.pad_id])

    @property
    def _no_prompt(self) -> list[int]:
        """The tokens of an empty prompt."""
        if not self.is_encoder_decoder:
            return [int(self.start_id)]
        return [int(i) for i in self.tokenizer("")["input_ids"]] or [(self.eos_ids or [self.pad_id])[0]]

    @property
    def _inner(self) -> PreTrainedModel:
        """The model without PEFT around it."""
        return unwrapped(self.model)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write a plain Hugging Face checkpoint, or a PEFT adapter, with the tokenizer, as safetensors."""
        self._check_whole_weights()
        # A proposal's adapter is part of a run, not of its result.
        adapters = {"selected_adapters": ["default"]} if self.has_adapter else {}
        self.model.save_pretrained(folder, **adapters)
        self.tokenizer.save_pretrained(folder)
        if self.guide is not None:
            self.guide.save(Path(folder) / GUIDE_FILE)

    def placed(self, guide: Guide) -> Guide:
        """The guide where the logits are, as precise as they are but no less than float32."""
        precise = next(self.model.parameters()).dtype == torch.float64
        return guide.to(self.device, torch.float64 if precise else torch.float32)

    def _check_whole_weights(self) -> None:
        if self.fingerprint is not None:
            raise UsageError(
                f"model: '{self.name}' is the frozen base of a tuned model, some of whose weights are held in "
                f"{self.compute_dtype} alone; load it again to copy, adapt or save it"
            )

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.get_text_config().vocab_size)

    @cached_property
    def memory(self) -> Memory:
        """What passes over it need of memory."""
        return Memory.of(self.model, narrow=self.compute_dtype is not None)

    @property
    def _token_bytes(self) -> int:
        """What one token needs of memory in a pass with gradient, about."""
        return self.memory.logits if self.output_layer is None else self.memory.activations

    def check_length(self, prompts: Prompts, completion: int) -> None:
        """Raise UsageError, which names the longest prompt, where the model has too few positions for it."""
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if positions is None:
            return
        row = int(prompts.lengths.argmax())
        longest = int(prompts.lengths[row])
        which = f"prompt {prompts.ids[row] + 1}, {prompts.texts[row]!r:.60}," if len(prompts) > 1 else "a prompt"
        # The last token is never read. A decoder has its positions for itself, but for the one that starts it.
        room = positions if self.is_encoder_decoder else positions + 1 - longest
        if self.is_encoder_decoder and longest > positions:
            raise UsageError(
                f"prompts: {which} of {longest} tokens has more than the {positions} positions of '{self.name}'; "
                f"shorten it"
            )
        if completion > room:
            after = "" if self.is_encoder_decoder else f"after {which} of {longest} "
            raise UsageError(
                f"max_completion_length: {completion} tokens {after}are more than the {positions} positions of "
                f"'{self.name}'; "
                + (f"ask for at most {room}, or shorten the prompts" if room > 0 else "shorten the prompts")
            )


def _start_id(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that a text without a prompt starts after. Raises ModelError for a decoder that names none."""
    if not model.config.is_encoder_decoder:
        return int(tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id)
    for name in ("decoder_start_token_id", "bos_token_id"):
        for place in (model.generation_config, model.config):
            if getattr(place, name, None) is not None:
                return int(getattr(place, name))
    raise ModelError("model: its config.json has no decoder_start_token_id, after which its decoder would start")


def _check_whole(name: str, value: int | None, least: int) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < least):
        raise UsageError(f"{name}: {value!r} must be a whole number, at least {least}")
