"""Tiny random language models whose every completion can be listed, made from stock transformers configurations."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tiltlm.lm import Guide, LanguageModel, SamplingSettings

POSITIONS = 24


@dataclass(frozen=True)
class Tokens:
    """A vocabulary of words, and which of them end, start and pad a text."""

    words: str
    eos: str = "</s>"
    bos: str | None = None
    pad: str | None = None
    further_eos: tuple[str, ...] = ()
    prompts_start_with_bos: bool = False

    @property
    def ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words.split())}

    def tokenizer(self) -> PreTrainedTokenizerFast:
        backend = Tokenizer(models.WordLevel(self.ids, unk_token="a"))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if self.prompts_start_with_bos:
            assert self.bos is not None
            backend.post_processor = processors.TemplateProcessing(
                single=f"{self.bos} $A", special_tokens=[(self.bos, self.ids[self.bos])]
            )
        named = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self.pad}
        return PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in named.items() if v is not None})


# The ids of the special tokens differ between vocabularies, so that none is right by accident.
TOKENS = {
    "pad_is_eos": Tokens("</s> a b c d", bos="</s>", pad="</s>"),
    "pad_is_not_eos": Tokens("<s> <pad> </s> a b c", bos="<s>", pad="<pad>", prompts_start_with_bos=True),
    "several_eos": Tokens("a b <s> . </s> <pad>", bos="<s>", pad="<pad>", further_eos=(".",)),
    "no_bos": Tokens("a b </s> <pad> c", pad="<pad>"),
    "no_pad": Tokens("a </s> b c", bos="</s>"),
}

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "tie_word_embeddings": True,
}
SMALL_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": POSITIONS}

SIZES: dict[str, dict[str, Any]] = {
    "gpt2": SMALL_GPT2,
    "llama": SMALL,
    # A window shorter than the sequences, alone and in turns with full attention.
    "mistral": SMALL | {"sliding_window": 3},
    "gemma2": SMALL | {"sliding_window": 3},
    # Positions that the model makes of the attention mask by itself: learned ones, and distances.
    "opt": {
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": POSITIONS,
    },
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    # No cache at all; a state where others have keys and values; both in turns.
    "openai-gpt": SMALL_GPT2,
    "mamba": {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
    "lfm2": {k: v for k, v in SMALL.items() if k != "head_dim"} | {"layer_types": ["conv", "full_attention"]},
}
# Encoder and decoder: distances between positions, states scaled before the output layer; and learned positions.
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2},
    "bart": {
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "max_position_embeddings": POSITIONS,
    },
}
# In transformers, whatever the weights are: the softmax of attention is float32 in the first two (and rows of padding
# become NaN where the weights are float64), and the logits are float32 in the last.
FLOAT32_ONLY = ("gemma2", "bloom", "mamba")
# With larger embeddings these would give the next token a probability near 1.
EMBEDDING_STD = {"openai-gpt": 0.25, "mamba": 0.3, "gemma2": 0.15, "opt": 0.4}

SETTINGS = {
    "plain": SamplingSettings(),
    "temperature": SamplingSettings(temperature=0.6),
    "top_k": SamplingSettings(top_k=3),
    "top_p": SamplingSettings(top_p=0.8),
    "all_three": SamplingSettings(temperature=1.7, top_k=4, top_p=0.9),
}

PROMPTS: dict[str, Any] = {
    "none": None,
    "one": "a b",
    # Ragged; one holds an EOS, one is empty.
    "several": ["a", "b a b a", "a </s> b", None],
}


@cache
def tiny_model(
    architecture: str = "gpt2", tokens: str = "pad_is_eos", dtype: torch.dtype | None = None, seed: int = 0
) -> LanguageModel:
    """A random model with distributions far from uniform. Tests share it: copy it before you change it."""
    vocabulary = TOKENS[tokens]
    tokenizer = vocabulary.tokenizer()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    crossing = architecture in ENCODER_DECODERS
    if crossing:
        start = {"decoder_start_token_id": tokenizer.convert_tokens_to_ids("b")}
        special, sizes = special | start, ENCODER_DECODERS[architecture]
    else:
        sizes = {"initializer_range": 0.4, **SIZES[architecture]}
    config = transformers.AutoConfig.for_model(architecture, vocab_size=len(vocabulary.ids), **special, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        auto = transformers.AutoModelForSeq2SeqLM if crossing else transformers.AutoModelForCausalLM
        model = auto.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if crossing and parameter.ndim == 2:
                    # With smaller weights the output would hardly depend on the encoder.
                    cross_attention = any(part in name for part in ("encoder_attn", "EncDecAttention"))
                    parameter.normal_(std=1.0 if cross_attention else 0.5)
                elif any(part in name for part in ("emb", "wte", "wpe")):
                    parameter.normal_(std=EMBEDDING_STD.get(architecture, 0.7))
    if vocabulary.further_eos:
        further = [vocabulary.ids[word] for word in vocabulary.further_eos]
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *further]
    precise = torch.float32 if architecture in FLOAT32_ONLY else torch.float64
    return LanguageModel(model.to(dtype or precise), tokenizer, name=f"{architecture}, {tokens}")


def random_guide(model: LanguageModel, states: int = 3, rows: int = 5, seed: int = 0, start: int = 1) -> Guide:
    """A guide with random transitions and random log ψ, about as variable as the logits."""
    generator = torch.Generator().manual_seed(seed)
    transitions = torch.randint(states, (states, model.vocab_size), generator=generator)
    transitions[:, model.eos_ids] = torch.arange(states)[:, None] + states
    return Guide(transitions, 1.5 * torch.randn(rows, 2 * states, generator=generator, dtype=torch.float64), start)
