"""Checkpoints: all the state there is, so that a resumed run goes on bit for bit."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tiltlm.errors import CheckpointError
from tiltlm.lm import LanguageModel, Prompts, Samples, SamplingSettings
from tiltlm.targets import BaseSample

STATE, HEADER, BASE_SAMPLE = "tensors.pt", "state.json", "base_sample.pt"
# The layout of a checkpoint. Version 1 (tiltlm 0.1) had one flat table of tensors and one of numbers.
SCHEMA = 2
KEPT = 2


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write ``step-NNNNNN`` under ``folder``, whole or not at all, and drop all but the last two.

    ``state`` may hold tensors, numbers, strings, None, lists and dicts of these. Raises CheckpointError when the disk
    is full; earlier checkpoints stay.
    """
    final = folder / f"step-{step:06d}"
    partial = folder / f"partial-{step:06d}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with (partial / STATE).open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        header = {"schema": SCHEMA, "step": step, "sha256": _digest(partial / STATE)}
        (partial / HEADER).write_text(json.dumps(header))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError of its own.
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written under {folder}: {_reason(error)}. "
            f"Free some space and go on with --resume; earlier checkpoints are untouched."
        ) from error
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps, or None."""
    return max(folder.glob("step-*"), default=None)


def load_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU. Raises CheckpointError for a damaged one, or one of a later version."""
    try:
        header = json.loads((checkpoint / HEADER).read_text())
        if _digest(checkpoint / STATE) != header["sha256"]:
            raise ValueError("its contents do not match its checksum")
        state: dict[str, Any] = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
        schema = header.get("schema", 1)
        if schema == 1:
            return _from_schema_1(state, header)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint} is damaged ({type(error).__name__}: {error}). Delete that folder to resume from "
            f"the one before it, or start anew in another output directory."
        ) from error
    if schema != SCHEMA:
        raise CheckpointError(
            f"checkpoint {checkpoint} has schema {schema}, and this version of tiltlm reads 1 and {SCHEMA}; resume "
            f"with the version that wrote it"
        )
    return state


def _from_schema_1(tensors: dict[str, Any], numbers: dict[str, Any]) -> dict[str, Any]:
    """The state of a checkpoint of tiltlm 0.1, with the name that each part has now."""
    pool, counts, leaning = tensors["pool"], numbers["passes"], tensors["leaning"]
    if pool is not None:
        renamed = {"names": "proposals", "score": "target_logscore", "under": "logprobs", "earlier": "past"}
        pool = {renamed.get(name, name): value for name, value in pool.items()}
    return {
        **{name: tensors[name] for name in ("policy", "optimizer", "scheduler", "scaler")},
        "step": numbers["step"],
        "seconds": numbers["seconds"],
        "kept_proposal": tensors["proposal"],
        "objective": {} if numbers["moving"] is None else {"adaptive_value": numbers["moving"]},
        "minimum_variance": {"moments": tensors["balance"]},
        "partition": numbers["partition"],
        "counter": counts,
        "drawer": {
            "queue": {"position": numbers["queue"]},
            "generator": tensors["generator"],
            "proposal": numbers["source"],
        },
        "guidance": {"offsets": leaning} if leaning is not None else None,
        "replay": {
            "buffer": pool,
            "early_stopping": {"seen": numbers["reuse"]["seen"], "stopped": not numbers["reuse"]["holds"]},
        },
    }


def save_base_sample(folder: Path, sample: BaseSample) -> None:
    """Keep the base samples that a target was fitted on, so that a resumed run has the very same target."""
    samples = sample.samples
    state = {
        **{name: getattr(samples, name) for name in ("tokens", "mask", "proposal_logprob", "prompt_index")},
        "exact": samples.exact,
        "prompts": {name: _plain(value) for name, value in vars(samples.prompts).items()},
        "features": sample.features,
        **{
            name: getattr(sample, name) for name in ("max_completion_length", "base_logprob", "plain", "forward_passes")
        },
    }
    partial = folder / f"{BASE_SAMPLE}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(state, file)
        os.replace(partial, folder / BASE_SAMPLE)
    except (OSError, RuntimeError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"the base's samples could not be written under {folder}: {_reason(error)}. "
            f"Free some space and go on with --resume."
        ) from error


def load_base_sample(folder: Path, base: LanguageModel) -> BaseSample | None:
    """What ``save_base_sample`` kept, or None. Raises CheckpointError for a damaged file."""
    path = folder / BASE_SAMPLE
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location=base.device, weights_only=True)
        prompts = Prompts(**state["prompts"])
        samples = Samples(
            tokens=state["tokens"],
            mask=state["mask"],
            proposal_logprob=state["proposal_logprob"],
            prompt_index=state["prompt_index"],
            prompts=prompts,
            settings=SamplingSettings(),
            tokenizer=base.tokenizer,
            exact=state.get("exact", True),
        )
        drawn = {name: state.get(name) for name in ("base_logprob", "plain")}
        return BaseSample(
            samples,
            state["features"].cpu(),
            state["max_completion_length"],
            **drawn,
            forward_passes=state.get("forward_passes", state.get("readings", 0)),
        )
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is damaged ({reason}). Start anew in another output directory.") from error


def _plain(value: Any) -> Any:
    """Mappings of all kinds as dictionaries, since no others can be read back."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return type(value)(map(_plain, value)) if isinstance(value, list | tuple) else value


def _reason(error: BaseException) -> str:
    """What the file system said: torch may report a full disk as an error of its own that followed from it."""
    link: BaseException | None = error
    while link is not None:
        if getattr(link, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return "no space left on the disk"
        link = link.__context__
    return str(error)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
