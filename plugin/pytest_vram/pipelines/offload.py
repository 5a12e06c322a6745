"""Offload with no GPU: the comings and goings of the weights, told to a recorder as the hooks of accelerate and
diffusers make them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import count
from typing import Any, Protocol
from unittest.mock import patch

import torch
from diffusers.hooks import group_offloading

from pytest_vram.errors import Inapplicable
from pytest_vram.pipelines.build import modules_in_order, networks, stored

META = torch.device("meta")


class Recorder(Protocol):
    """Where memory on the simulated GPU is taken and given back."""

    gpu: int  # of those that a case takes, the one that is simulated

    def empty_cache(self) -> None: ...

    def side_stream(self, number: int) -> AbstractContextManager[None]:
        """What comes meanwhile comes by this stream, beside the one that computes, and takes memory of its own."""

    def host(self) -> AbstractContextManager[None]:
        """What is computed meanwhile is computed on the host."""

    def on_host(self, tensor: torch.Tensor) -> None:
        """From now on this tensor's storage takes nothing on the GPU, nor does a copy of it."""

    def arrive(self, tensor: torch.Tensor) -> None:
        """This tensor's storage comes to the GPU."""


class Unit:
    """The weights that come and go together."""

    def __init__(self, modules: Sequence[torch.nn.Module], recorder: Recorder, buffers: bool = True) -> None:
        """`buffers` says whether they come and go too."""
        self.modules, self.recorder, self.buffers = modules, recorder, buffers
        self.loaded = False
        self.loads = 0
        self._each(recorder.on_host)

    def _each(self, move: Callable[[torch.Tensor], None]) -> None:
        """What the modules hold now: a cast in between makes new tensors."""
        for module in self.modules:
            for tensor in (*module._parameters.values(), *(module._buffers.values() if self.buffers else ())):
                for part in stored(tensor) if tensor is not None else ():
                    move(part)

    def load(self) -> None:
        if not self.loaded:
            self.loaded = True
            self.loads += 1
            self._each(self.recorder.arrive)

    def drop(self) -> None:
        self.loaded = False
        self._each(self.recorder.on_host)


class _Entry:
    """The hook that accelerate leaves on a network; methods other than forward (a VAE's decode) look for it."""

    def __init__(self, unit: Unit, previous: Unit | None) -> None:
        self.unit, self.previous = unit, previous

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if self.previous and self.previous.loaded:
            self.previous.drop()
            self.unit.recorder.empty_cache()
        self.unit.load()
        return args, kwargs

    def enter(self, module: Any, _: Any) -> None:
        self.pre_forward(module)


def one_network_at_a_time(pipe: Any, recorder: Recorder) -> Callable[[], bool]:
    """`enable_model_cpu_offload`: entering a network sends away the one before it in the pipeline's order, and the end
    of a call all; one that is entered out of order finds others still there. The result says whether any came."""
    left = networks(pipe)
    units: list[Unit] = []

    def hooked(network: torch.nn.Module, previous: Unit | None) -> Unit:
        unit = Unit(list(modules_in_order({"": network})), recorder)
        entry = _Entry(unit, previous)
        network._hf_hook = entry  # type: ignore[assignment]
        network.register_forward_pre_hook(entry.enter)
        units.append(unit)
        return unit

    previous = None
    for name in (pipe.model_cpu_offload_seq or "").split("->"):
        if name in left:
            previous = hooked(left.pop(name), previous)
    for name, network in left.items():
        unit = hooked(network, None)
        if name in pipe._exclude_from_cpu_offload:
            unit.load()

    def all_leave() -> None:
        for unit in units:
            unit.drop()
        recorder.empty_cache()

    pipe.maybe_free_model_hooks = all_leave
    return lambda: sum(unit.loads for unit in units) > 0


def one_layer_at_a_time(networks: Mapping[str, torch.nn.Module], recorder: Recorder) -> Callable[[], bool]:
    """`enable_sequential_cpu_offload`: every module with weights of its own has them for its own forward only, and
    accelerate empties the allocator's cache when they have come. Buffers go to the GPU at once, unless the network has
    parameters of its own."""
    units = []

    def enter(unit: Unit) -> None:
        unit.load()
        recorder.empty_cache()

    for network in networks.values():
        with_buffers = len(network._parameters) > 0
        for module in network.modules():
            buffers = [buffer for buffer in module._buffers.values() if buffer is not None]
            if not with_buffers:
                for buffer in buffers:
                    recorder.arrive(buffer)
            if not (with_buffers and buffers) and all(weight is None for weight in module._parameters.values()):
                continue
            unit = Unit([module], recorder, with_buffers)
            module.register_forward_pre_hook(lambda _, __, unit=unit: enter(unit))
            module.register_forward_hook(lambda _, __, ___, unit=unit: unit.drop())
            units.append(unit)
    return lambda: any(unit.loads for unit in units)


class _Stream:
    """By which diffusers copies the weights of one network; here they have come as soon as they are asked for."""

    def __init__(self, number: int) -> None:
        self.number = number

    def synchronize(self) -> None: ...


class _Group:
    """What diffusers' hooks take for a `ModuleGroup`: they read its attributes and call `onload_` and `offload_`."""

    def __init__(
        self,
        recorder: Recorder,
        *,
        modules: Sequence[torch.nn.Module],
        parameters: Sequence[torch.Tensor] | None = None,
        buffers: Sequence[torch.Tensor] | None = None,
        offload_leader: torch.nn.Module,
        onload_leader: torch.nn.Module | None = None,
        onload_device: torch.device,
        onload_self: bool = True,
        stream: _Stream | None = None,
        non_blocking: bool = False,
        disk: bool = False,
        **_: Any,
    ) -> None:
        self.modules, self.parameters, self.buffers = modules, parameters or [], buffers or []
        self.offload_leader, self.onload_leader, self.onload_self = offload_leader, onload_leader, onload_self
        self.onload_device, self.stream, self.non_blocking = onload_device, stream, non_blocking
        self.offload_device: torch.device | None = onload_device
        self.recorder = recorder
        self.loads = 0
        self.copied = disk or stream is not None  # into files or pinned memory, once
        self.copies = {id(tensor): tensor.dtype for tensor in self._tensors()}

    def _tensors(self) -> list[torch.Tensor]:
        """In the order in which they come."""
        tensors = [tensor for module in self.modules for tensor in (*module.parameters(), *module.buffers())]
        return list({id(tensor): tensor for tensor in (*tensors, *self.parameters, *self.buffers)}.values())

    def onload_(self) -> None:
        tensors = self._tensors()
        if self.copied and any(self.copies.get(id(tensor)) != tensor.dtype for tensor in tensors):
            raise Inapplicable("this group offload undoes the cast of a network that is cast after it")
        self.loads += 1
        self.offload_device = None  # no weight is where it rests, which is how the hooks ask whether they have come
        with self.recorder.side_stream(self.stream.number) if self.stream else nullcontext():
            for tensor in tensors:
                self.recorder.arrive(tensor)

    def offload_(self) -> None:
        self.offload_device = self.onload_device
        for tensor in self._tensors():
            self.recorder.on_host(tensor)
        if not self.copied and self.loads:  # Module.to() makes new buffers; those in `buffers` still come, too
            for part in (part for module in self.modules for part in module.modules()):
                for name, buffer in part._buffers.items():
                    if buffer is not None:
                        part._buffers[name] = buffer.to(buffer.device, copy=True)


def ungroupable(network: torch.nn.Module, *, leaf: bool) -> str | None:
    """Why this network would fail under diffusers' group offload, or None.

    Hooks sit on forward alone: where `decode` is called, or a layer's weight is used without calling the layer, the
    weights stay in host memory. A VAE by blocks needs a list of its parts, which few classes have.
    """
    kind = type(network).__name__
    if not getattr(network, "_supports_group_offloading", True):
        return f"{kind} does not support group offload"
    if not leaf and hasattr(network, "decode") and not getattr(network, "_group_offload_block_modules", None):
        return f"{kind} does not support group offload by blocks: its weights would stay in host memory for decode"
    if leaf and any(isinstance(module, torch.nn.MultiheadAttention) for module in network.modules()):
        return f"{kind} does not support group offload by leaves: it has a MultiheadAttention, which calls no out_proj"
    return None


def unwritable(network: torch.nn.Module) -> str | None:
    """Why diffusers cannot keep the groups of this network in files, or None. Of a weight in two groups the second one
    saves what the first has left of it."""
    kind = type(network).__name__
    if any(len(stored(weight)) > 1 for weight in network.parameters()):
        return f"{kind} is quantized: its weights cannot be saved in files"
    weights = [weight for module in network.modules() for weight in module._parameters.values() if weight is not None]
    return f"{kind} has tied weights: in files they get lost" if len({*map(id, weights)}) < len(weights) else None


def groups_at_a_time(
    networks: Mapping[str, torch.nn.Module],
    recorder: Recorder,
    *,
    leaf: bool,
    blocks: int = 1,
    stream: bool = False,
    disk: bool = False,
    exclude: Collection[str] = (),
) -> Callable[[], bool]:
    """`enable_group_offload` by leaves or by groups of `blocks`: a group's weights are there for its forward, with a
    `stream` from that of the group before it on, once a first forward has shown the order. Networks to `exclude` come
    at once and stay. The allocator's cache is never emptied. The result says whether any group came.

    The hooks are diffusers' own; only a group's comings and goings are replaced. With a stream each network has one of
    its own, as diffusers makes them; what differs: weights come in no time, buffers go with them, and where a group is
    fetched again before it leaves, no weight is there twice meanwhile. `record_stream` is off: the host waits for the
    GPU before weights leave, so that their memory is free at once. From `disk` weights come as from host memory.

    Raises:
        Inapplicable: when a network would fail under it; with a stream or from disk also later, when one is cast and
            then comes.
    """
    groups: list[_Group] = []
    streams, real_config = count(1), group_offloading.GroupOffloadingConfig

    def group(**given: Any) -> _Group:
        groups.append(_Group(recorder, disk=disk, **given))
        return groups[-1]

    def config(**given: Any) -> Any:  # of one network
        return real_config(**{**given, "stream": _Stream(next(streams)) if stream else None})

    options: dict[str, Any] = {
        "onload_device": META,
        "offload_type": "leaf_level" if leaf else "block_level",
        "num_blocks_per_group": blocks,
    }
    with patch.multiple(group_offloading, ModuleGroup=group, GroupOffloadingConfig=config):
        for network in (network for name, network in networks.items() if name not in exclude):
            if problem := ungroupable(network, leaf=leaf):
                raise Inapplicable(problem)
            apply: Any = getattr(
                network, "enable_group_offload", partial(group_offloading.apply_group_offloading, network)
            )
            apply(**options)
    for name in exclude:
        for module in modules_in_order({name: networks[name]}):
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    recorder.arrive(tensor)
    return lambda: any(group.loads for group in groups)
