"""A GPU that is not there: tensors on it lie in memory, but mixing them with the CPU's fails as on a real one.

What a CUDA device refuses is a matter of where tensors are and not of their numbers. So a test without such a device
finds what would fail on one: the place of each tensor is kept beside it, and every call of torch is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from tiltlm.app import tune as job
from tiltlm.lm import decoding, forward
from tiltlm.training import acceleration, trainer

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
# They take tensors of both: a copy goes from one to the other.
ENCODER_DECODERS = {Tensor.copy_, Tensor.__setitem__, torch._has_compatible_shallow_copy_type}
RealGenerator = torch.Generator


class Generator(torch.Generator):
    """A generator of random numbers that says it is on the pretended GPU; for any other device a real one."""

    device = GPU

    def __new__(cls, device: Any = "cpu") -> Any:
        if torch.device(device).type != "cuda":
            return RealGenerator()
        return super().__new__(cls)

    def __init__(self, device: Any = "cpu") -> None:
        super().__init__()


class PretendedGPU(TorchFunctionMode):
    """While it is on, ``cuda`` is a device."""

    def __init__(self) -> None:
        super().__init__()
        # A storage that is gone leaves its reference here, so that none takes its number.
        self.held: dict[int, StorageWeakRef] = {}
        self.limit = 1000

    def is_there(self, tensor: Tensor) -> bool:
        """Whether a tensor lies on the pretended GPU."""
        return tensor.layout == torch.strided and tensor.untyped_storage()._cdata in self.held

    def put(self, found: Any) -> Any:
        """Take all tensors of a result for the GPU's own."""
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided and not self.is_there(tensor):
                reference = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
                self.held[reference.cdata] = reference
        if len(self.held) > self.limit:
            self.held = {place: one for place, one in self.held.items() if not one.expired()}  # type: ignore[no-untyped-call]
            self.limit = 1000 + 2 * len(self.held)
        return found

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__set__":
            return func(*args)
        if name == "__get__":
            return self._attribute(func, args)
        if func in (Tensor.cpu, Tensor.cuda, Tensor.to):
            return self._moved(func, args, kwargs)
        if func in (Tensor.numpy, Tensor.__array__) and self.is_there(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == "meta":
            return func(*args, **kwargs)
        if wanted is not None:
            wants_gpu = torch.device(wanted).type == "cuda"
            found = func(*args, **{**kwargs, "device": CPU})
            first = args[0] if args and isinstance(args[0], Tensor) else None
            # torch.as_tensor may give what it was given.
            if first is not None and found is first and self.is_there(first) != wants_gpu:
                found = found.clone()
            return self.put(found) if wants_gpu else found
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        there = [self.is_there(one) for one in tensors]
        if torch._C._current_graph_task_id() != -1:
            # Of what backward hands to Python nothing is known; it comes from tensors that have been looked at.
            return self.put(func(*args, **kwargs))
        if any(there) and not all(there) and func not in ENCODER_DECODERS:
            self._check(func, args, tensors, there)
        generator = kwargs.get("generator")
        if generator is not None and tensors and any(there) != isinstance(generator, Generator):
            raise RuntimeError(f"{name}: expected a generator on the device of its tensors")
        found = func(*args, **kwargs)
        return self.put(found) if any(there) and func not in ENCODER_DECODERS else found

    def _check(self, func: Callable[..., Any], args: Any, tensors: list[Tensor], there: list[bool]) -> None:
        if func is Tensor.__getitem__ and self.is_there(args[0]):
            return  # indices may lie on the CPU
        if any(one.dim() > 0 for one, on_gpu in zip(tensors, there, strict=True) if not on_gpu):
            shapes = [
                (tuple(one.shape), "cuda" if on_gpu else "cpu") for one, on_gpu in zip(tensors, there, strict=True)
            ]
            raise RuntimeError(f"{getattr(func, '__name__', func)}: all tensors on the same device expected: {shapes}")

    def _attribute(self, func: Callable[..., Any], args: Any) -> Any:
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if attribute == "device":
            return GPU if self.is_there(args[0]) else func(*args)
        if attribute == "is_cuda":
            return self.is_there(args[0])
        if attribute == "is_cpu":
            return not self.is_there(args[0])
        found = func(*args)
        return self.put(found) if attribute == "grad" and self.is_there(args[0]) else found

    def _moved(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Tensor:
        rest = list(args[1:])
        tensor: Tensor = args[0]
        there = func is Tensor.cuda
        if func is Tensor.to:
            wanted = kwargs.pop("device", None)
            if rest and isinstance(rest[0], Tensor):
                wanted, rest[0] = GPU if self.is_there(rest[0]) else CPU, rest[0].dtype
            elif rest and isinstance(rest[0], str | torch.device | int):
                wanted = rest.pop(0)
                rest.insert(0, CPU)
            if wanted is not None and torch.device(wanted).type == "meta":
                return tensor.to("meta")
            there = self.is_there(tensor) if wanted is None else torch.device(wanted).type == "cuda"
        found = tensor.to(*rest, **kwargs) if func is Tensor.to and (rest or kwargs) else tensor
        if self.is_there(found) == there:
            return found
        found = found.clone()
        if there:
            self.put(found)
        return found


@contextmanager
def pretended_gpu() -> Iterator[PretendedGPU]:
    """``cuda`` is a device within the block, of no speed; steps of decoding are not recorded as graphs."""
    mode = PretendedGPU()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**30, 2**30))
        patch.setattr(forward, "PIECE_BYTES_ELSEWHERE", forward.PIECE_BYTES["cpu"])
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))
        patch.setattr(decoding.StaticDecoder, "_capture", lambda self, logits: None)
        load: Callable[..., Any] = torch.load
        build = acceleration.build_accelerator

        def loaded(*args: Any, map_location: Any = None, **kwargs: Any) -> Any:
            found = load(*args, map_location=CPU, **kwargs)
            return mode.put(found) if map_location is not None and torch.device(map_location).type == "cuda" else found

        def accelerator(args: Any, device: torch.device) -> Any:
            built = build(args, CPU)
            patch.setattr(type(built), "device", property(lambda self: GPU))
            return built

        patch.setattr(torch, "load", loaded)
        for place in (trainer, job):
            patch.setattr(place, "build_accelerator", accelerator)
        with mode:
            yield mode
