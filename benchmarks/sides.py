"""Shared by several benchmarks: the reward, a trainer of tiltlm on it, and models loaded with transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from side_by_side import count_positions, tally

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from tiltlm.objectives import Objective
    from tiltlm.training.proposal_rules import ProposalRule
    from tiltlm.training.trainer import Trainer

BETA = 0.05
LEARNING_RATE = 1e-5
FIT_SAMPLES = 256
LORA: dict[str, Any] = {"r": 8, "target_modules": "all-linear"}


def vowels(completions: list[str], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """The share of vowels in each text, as a reward function of TRL; counts sequences and tokens."""
    tally.drawn(len(completion_ids), sum(map(len, completion_ids)))
    return [sum(letter in "aeiou" for letter in text) / max(1, len(text)) for text in completions]


def our_trainer(
    folder: str,
    *,
    objective: Objective | None = None,
    rule: ProposalRule | None = None,
    batch: int,
    length: int,
    dtype: str = "float32",
    device: str = "cpu",
    rows: int | None = None,
    lora: bool = False,
) -> Trainer:
    """A trainer for the target a(x) exp(reward/β), by default with GDC++ on-policy; ``rows`` per forward pass."""
    from tiltlm.config.training import TrainingArguments
    from tiltlm.features import callable_feature
    from tiltlm.lm import LanguageModel, Roles
    from tiltlm.objectives import GDCPlusPlus
    from tiltlm.targets import draw_base_sample, fit_target, target_terms
    from tiltlm.training.method import Method
    from tiltlm.training.proposal_rules import proposal_rule
    from tiltlm.training.trainer import Trainer

    model = LanguageModel.from_pretrained(folder, device=device, dtype=dtype)
    count_positions(model.vocab_size)
    reward = callable_feature(vowels)
    fit_samples = min(FIT_SAMPLES, batch)
    sample = draw_base_sample(model, [reward], fit_samples, max_completion_length=length)
    target = fit_target(target_terms([], reward=reward, beta=BETA), sample)
    args = TrainingArguments(
        max_steps=10**6,
        batch_size=batch,
        per_device_train_batch_size=rows,
        learning_rate=LEARNING_RATE,
        reuse_fit_samples=False,
        save_steps=0,
    )
    roles = Roles(model.with_lora(**LORA) if lora else model)
    method = Method(objective or GDCPlusPlus(), rule or proposal_rule("on_policy"))
    return Trainer(roles, target, method, args, base_sample=sample)


def generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n: int, length: int, **settings: Any) -> Any:
    """n completions of BOS by transformers, at temperature 1; ``settings`` are further arguments of generate()."""
    import torch

    prompts = torch.full((n, 1), tokenizer.bos_token_id, device=model.device)
    return model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        max_new_tokens=length,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )


def load(folder: str, dtype: str = "float32", device: str = "cpu") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer, loaded with transformers; positions are counted from now on."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    count_positions(model.config.vocab_size)
    return model, AutoTokenizer.from_pretrained(folder)
