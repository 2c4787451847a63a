"""Train the small models of examples/features/*.yaml on sentences sampled from the embedded model.

    python scripts/train_example_models.py

It needs no network. It writes to examples/models (2.5 MB, not under version control):

    topics      a classifier of topics, trained on labels from the word lists; half of the time their words are masked
    reward      a reward model, trained on VADER's sentiment
    sentences   an embedding model; the two halves of one sentence have similar embeddings
    code, json  language models of small Python functions and JSON objects, some of them broken

The first three share their weights below the heads.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer, WordPieceTrainer
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss, normalize
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    ModernBertModel,
    PreTrainedTokenizerFast,
)

import tiltlm
from tiltlm.features import measure, sentiment, wordlist

TOPICS = ("military", "music", "politics", "religion", "sports")
LABELS = (*TOPICS, "other")
MOST_TOKENS = 64
BROKEN_SHARE = 0.4


def sentence_tokenizer(sentences: Sequence[str], vocab_size: int = 2000) -> PreTrainedTokenizerFast:
    pieces = Tokenizer(WordPiece(unk_token="[UNK]"))
    pieces.normalizer, pieces.pre_tokenizer, pieces.decoder = BertNormalizer(), BertPreTokenizer(), decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces.train_from_iterator(sentences, WordPieceTrainer(vocab_size=vocab_size, special_tokens=special))
    pieces.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        model_max_length=MOST_TOKENS,
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
    )


def train_encoders(sentences: list[str], folder: Path, steps: int, seed: int) -> dict[str, float]:
    """Train classifier, reward model and embedding model jointly; returns their metrics on held-out sentences."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    lists = [wordlist(topic) for topic in TOPICS]
    found = measure([*lists, sentiment()], sentences)
    # A sentence with words of two lists has no label (-100).
    hits = found[:, :-1]
    topic = torch.where(hits.sum(1) == 1, hits.argmax(1), torch.where(hits.sum(1) == 0, len(TOPICS), -100))
    tokenizer = sentence_tokenizer(sentences)
    config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 96,
        "max_position_embeddings": MOST_TOKENS,
        "classifier_pooling": "mean",
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"[{name.upper()}]") for name in ("pad", "cls", "sep")},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    topics = ModernBertForSequenceClassification(ModernBertConfig(**config, **names))
    reward = ModernBertForSequenceClassification(ModernBertConfig(**config, num_labels=1, id2label={0: "positive"}))
    reward.model = trunk = topics.model
    sentences_model = ModernBertModel(ModernBertConfig(**config))

    def inputs(texts: Sequence[str]) -> dict[str, Tensor]:
        encoded = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        return {key: encoded[key] for key in ("input_ids", "attention_mask")}

    def embedding(texts: Sequence[str]) -> Tensor:
        encoded = inputs(texts)
        mask = encoded["attention_mask"].unsqueeze(-1)
        return normalize((trunk(**encoded).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)

    def masked(row: int) -> str:
        """The sentence; half of the time the words that define its topic are masked."""
        text, kind = sentences[row], int(topic[row])
        if 0 <= kind < len(TOPICS) and rng.random() < 0.5:
            for start, end in reversed(lists[kind].evidence(text)):
                text = text[:start] + "[MASK]" + text[end:]
        return text

    def loss(rows: list[int]) -> Tensor:
        chosen = torch.tensor(rows)
        plain = inputs([sentences[row] for row in rows])
        of_topic = cross_entropy(topics(**inputs([masked(row) for row in rows])).logits, topic[chosen])
        of_reward = mse_loss(reward(**plain).logits[:, 0], found[chosen, -1].float())
        words = [sentences[row].split() for row in rows]
        first = embedding([" ".join(each[: len(each) // 2]) for each in words])
        second = embedding([" ".join(each[len(each) // 2 :]) for each in words])
        near = cross_entropy(first @ second.T / 0.1, torch.arange(len(rows)))
        return of_topic + 2 * of_reward + 0.2 * near

    held_out = list(range(len(sentences) // 10))
    parameters = {id(p): p for model in (topics, reward) for p in model.parameters()}
    descend(loss, list(parameters.values()), range(len(held_out), len(sentences)), steps, 32, 8e-3, rng)
    topics.eval()
    reward.eval()
    kinds, scores = [], []
    with torch.no_grad():
        for start in range(0, len(held_out), 64):
            encoded = inputs([sentences[row] for row in held_out[start : start + 64]])
            kinds.append(topics(**encoded).logits.argmax(1))
            scores.append(reward(**encoded).logits[:, 0])
    known = topic[held_out] >= 0
    figures = {
        "topic accuracy": float((torch.cat(kinds) == topic[held_out])[known].double().mean()),
        "accuracy of the label other": float((topic[held_out][known] == len(TOPICS)).double().mean()),
        "correlation with VADER": float(
            torch.corrcoef(torch.stack([torch.cat(scores), found[held_out, -1].float()]))[0, 1]
        ),
    }
    sentences_model.load_state_dict(trunk.state_dict())
    for name, model in (("topics", topics), ("reward", reward), ("sentences", sentences_model)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return figures


def some_code(rng: random.Random) -> str:
    """A function ``f`` of one argument; about a quarter of them double it."""
    doubling = ["2 * x", "x + x", "x * 2"]
    other = [
        f"x + {rng.randint(1, 9)}",
        f"x - {rng.randint(1, 9)}",
        f"{rng.randint(3, 9)} * x",
        "x * x",
        "-x",
        "abs(x)",
    ]
    body = rng.choice(doubling if rng.random() < 0.25 else other)
    shapes = ["def f(x):\n    return {}", "f = lambda x: {}", "def f(x):\n    y = {}\n    return y"]
    return rng.choice(shapes).format(body)


def some_json(rng: random.Random) -> str:
    """A person with a name and usually an age; sometimes the age is text."""
    person: dict[str, object] = {"name": rng.choice(["Ada", "Emmy", "Alan", "Kurt", "Grace"])}
    if rng.random() < 0.8:
        age = rng.randint(1, 99)
        person["age"] = str(age) if rng.random() < 0.3 else age
    if rng.random() < 0.4:
        person["born"] = rng.choice(["London", "Paris", "Rome", None])
    return json.dumps(person)


def sometimes_broken(text: str, rng: random.Random) -> str:
    """The text, without one character in ``BROKEN_SHARE`` of the calls, so that a model of such texts makes errors."""
    if rng.random() >= BROKEN_SHARE:
        return text
    at = rng.randrange(len(text))
    return text[:at] + text[at + 1 :]


def train_language_model(texts: list[str], folder: Path, steps: int, seed: int) -> dict[str, float]:
    """Train a language model of these texts; returns its training loss."""
    torch.manual_seed(seed)
    pieces = Tokenizer(BPE())
    pieces.pre_tokenizer, pieces.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<bos>", "<eos>"]
    trainer = BpeTrainer(vocab_size=384, special_tokens=special, initial_alphabet=ByteLevel.alphabet())
    pieces.train_from_iterator(texts, trainer)
    pieces.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>", padding_side="left"
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=MOST_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = LlamaForCausalLM(config)
    documents = [[*ids, 1] for ids in tokenizer(texts)["input_ids"]]
    losses: list[float] = []

    def loss(rows: list[int]) -> Tensor:
        width = max(len(documents[row]) for row in rows)
        ids = torch.tensor([documents[row] + [1] * (width - len(documents[row])) for row in rows])
        labels = torch.tensor([documents[row][1:] + [-100] * (width - len(documents[row]) + 1) for row in rows])
        value = cross_entropy(model(input_ids=ids, use_cache=False).logits.flatten(0, 1), labels.flatten())
        losses.append(value.item())
        return value

    descend(loss, list(model.parameters()), range(len(documents)), steps, 64, 5e-3, random.Random(seed))
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"nats per token": sum(losses[-10:]) / len(losses[-10:])}


def descend(
    loss: Callable[[list[int]], Tensor],
    parameters: list[torch.nn.Parameter],
    rows: range,
    steps: int,
    batch_size: int,
    rate: float,
    rng: random.Random,
) -> None:
    """Minimize ``loss`` by AdamW with linear warm-up and decay, on random batches of these rows."""
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / 10, (steps - step) / steps))
    for _ in range(steps):
        optimizer.zero_grad()
        loss(rng.sample(rows, batch_size)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def train_all(folder: Path, sentences: int = 3000, steps: int = 200, seed: int = 0) -> dict[str, dict[str, float]]:
    """Train all models into ``folder``; returns their metrics."""
    rng = random.Random(seed)
    base = tiltlm.LanguageModel.from_pretrained("embedded", device="cpu")
    texts = [text for text in dict.fromkeys(base.sample(sentences, seed=seed).texts) if text.strip()]
    snippets = {
        name: [sometimes_broken(make(rng), rng) for _ in range(4000)]
        for name, make in (("code", some_code), ("json", some_json))
    }
    return {
        "sentences": train_encoders(texts, folder, steps, seed),
        **{name: train_language_model(known, folder / name, steps, seed) for name, known in snippets.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("examples/models"))
    parser.add_argument("--sentences", type=int, default=3000, help="sentences sampled from the embedded model")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of each model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    began = time.monotonic()
    for name, figures in train_all(args.output_dir, args.sentences, args.steps, args.seed).items():
        print(f"{name}: " + ", ".join(f"{what} {value:.3f}" for what, value in figures.items()))
    print(f"written to {args.output_dir} in {time.monotonic() - began:.0f} seconds")


if __name__ == "__main__":
    main()
