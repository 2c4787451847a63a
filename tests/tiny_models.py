"""Models of a few thousand random weights, saved as their users would find them; built in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
SENTENCE = "she he won the a world cup race and lost album of songs in . ! , sang war user assistant"
WORDS = tuple(SENTENCE.split(" "))
POSITIONS = 24
CHAT_TEMPLATE = "{% for message in messages %}[CLS] {{ message['role'] }} {{ message['content'] }} [SEP]{% endfor %}"
TEXTS = [
    "She won the world cup.",
    "he sang",
    "",
    "The album of songs, and the race!",
    "a",
    "War and war and the war in the world.",
]
PROMPTS = ["He", "", "she lost the race. ", "in the", "the cup! ", "a"]


def tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    """Words as tokens; one text as [CLS] a [SEP], two as [CLS] a [SEP] b [SEP]."""
    ids = {token: i for i, token in enumerate([*SPECIAL, *WORDS])}
    made = Tokenizer(WordLevel(ids, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = Lowercase(), Whitespace()
    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokens: dict[str, Any] = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    # Token types too, as BERT's own tokenizer gives them; a model that knows none is not to be given any.
    tokens["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=made, **{**tokens, **settings})


def causal_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    """The same words without any special token around a text."""
    made = tokenizer(bos_token="[CLS]", eos_token="[SEP]", **settings)
    made.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B:1")
    return made


def bert_config(**settings: Any) -> BertConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertConfig(vocab_size=len(SPECIAL) + len(WORDS), max_position_embeddings=POSITIONS, **{**sizes, **settings})


def llama_config(**settings: Any) -> LlamaConfig:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        max_position_embeddings=POSITIONS,
        bos_token_id=2,
        eos_token_id=3,
        **{**sizes, **settings},
    )


def labels(*names: str) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def saved(folder: Path, model: PreTrainedModel, tokens: PreTrainedTokenizerFast | None) -> str:
    """The folder's name, with the model and its tokenizer in it."""
    model.save_pretrained(folder)
    if tokens is not None:
        tokens.save_pretrained(folder)
    return str(folder)


def spread(model: PreTrainedModel, seed: int = 0) -> Any:
    """The model with weights so large that its outputs differ from text to text."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def classifier_model(folder: Path, *names: str, seed: int = 0, **settings: Any) -> str:
    """A BERT that tells these labels apart."""
    model = spread(BertForSequenceClassification(bert_config(**labels(*names), **settings)), seed)
    return saved(folder, model, tokenizer(chat_template=CHAT_TEMPLATE))


def causal_reward_model(folder: Path) -> str:
    """A Llama with one output, read off its last token."""
    model = spread(LlamaForSequenceClassification(llama_config(num_labels=1, pad_token_id=0)), seed=1)
    return saved(folder, model, causal_tokenizer(chat_template=CHAT_TEMPLATE))


def embedding_model(folder: Path) -> str:
    return saved(folder, spread(BertModel(bert_config(), add_pooling_layer=False), seed=2), tokenizer())


def language_model(folder: Path) -> str:
    return saved(folder, spread(LlamaForCausalLM(llama_config(tie_word_embeddings=True)), seed=3), causal_tokenizer())
