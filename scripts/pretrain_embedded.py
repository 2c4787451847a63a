"""Train the language model that ships inside tiltlm, tokenizer and model card included.

    python scripts/pretrain_embedded.py --corpus ../shared/corpus --work-dir build/embedded \
        --output-dir src/tiltlm/lm/embedded_model

One sentence is one document, from BOS to EOS. After an interruption the same command continues from the last
checkpoint. It uses a GPU if there is one.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = "<|bos|>", "<|eos|>"


def read_sentences(path: Path) -> list[str]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [line.rstrip("\n") for line in file]


def train_tokenizer(sentences: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer(add_prefix_space=False)
    bpe.train_from_iterator(sentences, vocab_size=vocab_size, special_tokens=[BOS, EOS], show_progress=False)
    # A prompt starts with BOS, as every training sentence does.
    bpe._tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def build_model(vocab_size: int, bos: int, eos: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=704,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=eos,
    )
    return LlamaForCausalLM(config)


def batches(documents: list[list[int]], tokens_per_batch: int, rng: random.Random) -> list[list[int]]:
    """Batches of document indices in random order; documents of similar length share a batch, to save padding."""
    order = list(range(len(documents)))
    rng.shuffle(order)
    result = []
    for start in range(0, len(order), 8192):
        chunk = sorted(order[start : start + 8192], key=lambda i: len(documents[i]))
        batch: list[int] = []
        for index in chunk:
            if (len(batch) + 1) * len(documents[index]) > tokens_per_batch:
                result.append(batch)
                batch = []
            batch.append(index)
        result.append(batch)
    rng.shuffle(result)
    return result


def pad(documents: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded inputs [N, T] and labels [N, T], with -100 where no token is predicted."""
    width = max(map(len, documents))
    inputs = torch.tensor([d + [0] * (width - len(d)) for d in documents], device=device)
    labels = torch.tensor([d[1:] + [-100] * (width - len(d) + 1) for d in documents], device=device)
    return inputs, labels


def token_losses(model: LlamaForCausalLM, inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=inputs, use_cache=False).logits.float()
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")


# Fused element-wise operations double the speed on a CPU.
compiled_losses = torch.compile(token_losses, dynamic=True)


def summed_loss(model: LlamaForCausalLM, documents: list[list[int]], device: torch.device) -> tuple[torch.Tensor, int]:
    inputs, labels = pad(documents, device)
    return compiled_losses(model, inputs, labels), int((labels != -100).sum())


@torch.no_grad()
def validate(
    model: LlamaForCausalLM, documents: list[list[int]], n_bytes: int, device: torch.device
) -> dict[str, float]:
    """Nats per predicted token, and bits per byte with each EOS counted as one byte."""
    model.eval()
    total, count = 0.0, 0
    for batch in batches(documents, 8192, random.Random(0)):
        loss, n = summed_loss(model, [documents[i] for i in batch], device)
        total, count = total + loss.item(), count + n
    model.train()
    return {"nats_per_token": total / count, "bits_per_byte": total / math.log(2) / n_bytes}


def optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon on the hidden matrices, AdamW on the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [muon, adam]


def schedule(step: int, total: int, warmup: int = 50) -> float:
    """Linear warm-up, then linear decay to zero."""
    return min((step + 1) / warmup, (total - step) / max(1, total - warmup), 1.0)


def epochs(documents: list[list[int]], args: argparse.Namespace) -> Iterator[list[int]]:
    for epoch in range(args.epochs):
        yield from batches(documents, args.tokens_per_batch, random.Random(args.seed * 1000 + epoch))


def save_atomically(state: dict, path: Path) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def train(
    model: LlamaForCausalLM,
    documents: list[list[int]],
    valid: list[list[int]],
    valid_bytes: int,
    args: argparse.Namespace,
) -> tuple[float, list[dict[str, int]]]:
    """Train to the end of the schedule; returns the seconds spent and the planned epochs of each sitting."""
    device = next(model.parameters()).device
    opts = optimizers(model, args)
    plan = list(epochs(documents, args))
    total = min(len(plan), args.max_steps or len(plan))
    checkpoint = args.work_dir / "checkpoint.pt"
    step, spent = 0, 0.0
    # The planned epochs of each sitting; the model card reports changes.
    sittings = [{"from_step": 0, "epochs": args.epochs}]
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(saved)
        step, spent, sittings = state["step"], state["seconds"], state["sittings"]
        if sittings[-1]["epochs"] != args.epochs:
            sittings.append({"from_step": step, "epochs": args.epochs})
        print(f"resuming at step {step} of {total}")
    began = time.monotonic()
    columns = (
        TextColumn("loss {task.fields[loss]:.3f}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    log = (args.work_dir / "log.jsonl").open("a")
    with Progress(*columns) as progress:
        task = progress.add_task("pretrain", total=total, completed=step, loss=float("nan"))
        mean = 0.0
        while step < total:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                loss, count = summed_loss(model, [documents[i] for i in plan[step]], device)
            (loss / count).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt, peak in zip(opts, (args.muon_lr, args.adam_lr), strict=True):
                for group in opt.param_groups:
                    group["lr"] = peak * schedule(step, total)
                opt.step()
                opt.zero_grad(set_to_none=True)
            step += 1
            value = loss.item() / count
            mean = value if step == 1 else 0.95 * mean + 0.05 * value
            progress.update(task, completed=step, loss=mean)
            if step % args.save_steps == 0 or step == total:
                seconds = spent + time.monotonic() - began
                state = {
                    "model": model.state_dict(),
                    "optimizers": [o.state_dict() for o in opts],
                    "step": step,
                    "seconds": seconds,
                    "sittings": sittings,
                }
                save_atomically(state, checkpoint)
                record = {
                    "step": step,
                    "of": total,
                    "train_loss": mean,
                    "seconds": round(seconds),
                    **validate(model, valid, valid_bytes, device),
                }
                log.write(json.dumps(record) + "\n")
                log.flush()
                progress.console.print(record)
    return spent + time.monotonic() - began, sittings


def schedule_changes(sittings: list[dict[str, int]]) -> str:
    """Changes of the planned epochs during training, for the model card; empty without any."""
    if len(sittings) == 1:
        return ""
    changes = "".join(f", from step {sitting['from_step']} for {sitting['epochs']}" for sitting in sittings[1:])
    return f"; planned for {sittings[0]['epochs']} epochs{changes}"


def model_card(
    figures: dict[str, float],
    parameters: int,
    seconds: float,
    sittings: list[dict[str, int]],
    documents: int,
    args: argparse.Namespace,
) -> str:
    return f"""---
license: cc-by-sa-3.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The embedded model of tiltlm

A small causal language model that writes one English sentence about somebody's life. With it, demos, tests and studies of
tiltlm run anywhere in seconds. Do not use it for anything else: its sentences state no facts.

| | |
| --- | --- |
| architecture | Llama (transformers), 4 layers, 256 wide, 4 heads with 2 key-value heads, tied embedding |
| parameters | {parameters:,} |
| tokenizer | byte-level BPE, {args.vocab_size:,} entries, trained on the same sentences; padding is the EOS token |
| corpus | {documents:,} sentences of 30 to 180 characters from 803 English Wikipedia featured articles, nearly all biographies, about 2012 |
| licence of the text | CC BY-SA 3.0, by Wikipedia's authors |
| validation loss | **{figures["nats_per_token"]:.3f} nats per token**, **{figures["bits_per_byte"]:.3f} bits per byte** (EOS counted as one byte), on 2,000 held-out sentences, with the float16 weights of this folder |
| optimizer | Muon (learning rate {args.muon_lr}) on the hidden matrices, AdamW ({args.adam_lr}) on the embedding and the norms; linear warm-up and decay{schedule_changes(sittings)} |
| epochs, batch | {args.epochs} epochs, {args.tokens_per_batch:,} tokens a batch, {"bfloat16 autocast" if args.bf16 else "float32"} |
| seed | {args.seed} |
| time | {seconds / 60:.0f} minutes on {torch.get_num_threads()} threads ({platform.machine()}, {"CUDA" if torch.cuda.is_available() else "CPU"}), shared with other work |
| software | torch {torch.__version__}, transformers {transformers.__version__} |

Trained by:

    python scripts/pretrain_embedded.py --corpus ../shared/corpus --work-dir build/embedded \\
        --output-dir src/tiltlm/lm/embedded_model --epochs {args.epochs} --seed {args.seed}

The model reproduces the bias of its corpus: 40.7% of the sentences have a male pronoun and no female one, 5.7% a female
pronoun and no male one.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with train.txt.gz and valid.txt.gz")
    parser.add_argument(
        "--work-dir", type=Path, required=True, help="checkpoint, tokenizer and log; resumed from if it exists"
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="where the trained model goes")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--max-steps", type=int, help="stop the schedule early, to try settings")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--tokens-per-batch", type=int, default=4096)
    parser.add_argument("--muon-lr", type=float, default=5e-3)
    parser.add_argument("--adam-lr", type=float, default=5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--save-steps", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    sentences = read_sentences(args.corpus / "train.txt.gz")
    held_out = read_sentences(args.corpus / "valid.txt.gz")
    if (args.work_dir / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.work_dir)
    else:
        tokenizer = train_tokenizer(sentences, args.vocab_size)
        tokenizer.save_pretrained(args.work_dir)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    documents, valid = ([[*ids, eos] for ids in tokenizer(texts)["input_ids"]] for texts in (sentences, held_out))
    valid_bytes = sum(len(text.encode()) + 1 for text in held_out)
    print(
        f"{sum(map(len, documents)):,} training tokens, {valid_bytes / (sum(map(len, valid)) - len(valid)):.2f} bytes per token"
    )

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(len(tokenizer), bos, eos).to(device).train()
    seconds, sittings = train(model, documents, valid, valid_bytes, args)
    model.half().float()
    figures = validate(model, valid, valid_bytes, device)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    parameters = sum(p.numel() for p in model.parameters())
    (args.output_dir / "README.md").write_text(model_card(figures, parameters, seconds, sittings, len(documents), args))
    print(json.dumps({"parameters": parameters, "seconds": round(seconds), **figures}))


if __name__ == "__main__":
    main()
