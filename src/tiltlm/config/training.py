"""Settings of the training loop, by TRL's names wherever they mean the same; knows no torch."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrainingArguments:
    """Settings of training. Every field has a default and a description."""

    max_steps: Annotated[int, Field(ge=0, description="batches; each gets num_iterations updates")] = 200
    batch_size: Annotated[int, Field(ge=1, description="sequences per batch")] = 512
    samples_per_prompt: Annotated[
        int | None,
        Field(
            ge=1, description="samples of each prompt in a batch (TRL's num_generations); null: one, prompts in turn"
        ),
    ] = None
    num_iterations: Annotated[
        int | None,
        Field(
            ge=1,
            description="updates per batch; null: the method's default, 4 for ppo, 2 for kept_guide, else 1",
        ),
    ] = None
    pool: Annotated[
        int, Field(ge=0, description="size of the replay buffer in sequences; further updates of a step train on it")
    ] = 0
    per_device_train_batch_size: Annotated[
        int | None,
        Field(ge=1, description="sequences per forward pass; does not change the result; null: as many as fit"),
    ] = None
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False, description="peak step size of the optimizer")] = (
        1e-4
    )
    optim: Annotated[str, Field(description="any class of torch.optim, e.g. adam, adamw, sgd, muon")] = "adam"
    optim_args: Annotated[dict[str, Any], Field(description="further arguments of that class")] = Field(
        default_factory=dict
    )
    lr_scheduler_type: Annotated[
        str, Field(description="any scheduler of transformers, e.g. constant, linear, cosine")
    ] = "constant_with_warmup"
    lr_scheduler_kwargs: Annotated[dict[str, Any], Field(description="further arguments of the scheduler")] = Field(
        default_factory=dict
    )
    warmup_steps: Annotated[int, Field(ge=0, description="steps over which the learning rate rises")] = 0
    max_grad_norm: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="gradients are clipped to this norm; 0: never")
    ] = 1.0
    reuse_fit_samples: Annotated[
        bool, Field(description="first train on the base samples that the target was fitted on, each once")
    ] = True
    keep_guide: Annotated[bool, Field(description="let the policy of any method keep a guide, as kept_guide does")] = (
        False
    )
    bf16: Annotated[bool, Field(description="compute in bfloat16, weights stay in float32")] = False
    fp16: Annotated[bool, Field(description="compute in float16 with loss scaling, weights stay in float32")] = False
    gradient_samples: Annotated[
        int,
        Field(ge=0, description="samples of each batch whose single gradients give the gradient noise; 0: none"),
    ] = 0
    save_steps: Annotated[
        int, Field(ge=0, description="steps between checkpoints; 0: only at the end or when interrupted")
    ] = 50
    logging_steps: Annotated[int, Field(ge=1, description="steps between reports to display and trackers")] = 1

    @model_validator(mode="after")
    def _whole_prompts(self) -> TrainingArguments:
        if self.batch_size % (self.samples_per_prompt or 1):
            raise ValueError(
                f"samples_per_prompt: {self.samples_per_prompt} does not divide batch_size {self.batch_size}"
            )
        return self
