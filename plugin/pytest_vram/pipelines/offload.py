"""Offload with no GPU: the comings and goings of the weights, told to a recorder as accelerate's hooks make them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch

Block = Any


class Recorder(Protocol):
    """Where memory on the simulated GPU is taken and given back."""

    def malloc(self, size: int) -> Block: ...

    def free(self, block: Block) -> None: ...

    def empty_cache(self) -> None: ...

    def on_host(self, tensor: torch.Tensor) -> None:
        """From now on this tensor's storage takes nothing on the GPU."""


class Unit:
    """The weights that come and go together."""

    def __init__(self, modules: Iterable[torch.nn.Module], recorder: Recorder) -> None:
        tensors = {
            id(tensor): tensor
            for module in modules
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if tensor is not None
        }
        self.sizes = [tensor.numel() * tensor.element_size() for tensor in tensors.values()]
        self.recorder = recorder
        self.blocks: list[Block] = []
        self.loads = 0
        for tensor in tensors.values():
            recorder.on_host(tensor)

    def load(self) -> None:
        if not self.blocks:
            self.loads += 1
            self.blocks = [self.recorder.malloc(size) for size in self.sizes]

    def drop(self) -> None:
        while self.blocks:
            self.recorder.free(self.blocks.pop(0))


class _Entry:
    """The hook that accelerate leaves on a network; methods other than forward (a VAE's decode) look for it."""

    def __init__(self, unit: Unit, units: Iterable[Unit]) -> None:
        self.unit, self.units = unit, units

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self.unit.blocks:
            for other in self.units:
                other.drop()
            self.unit.recorder.empty_cache()
            self.unit.load()
        return args, kwargs

    def enter(self, module: Any, _: Any) -> None:
        self.pre_forward(module)


def one_network_at_a_time(networks: Mapping[str, torch.nn.Module], recorder: Recorder) -> Callable[[], bool]:
    """`enable_model_cpu_offload`: entering a network sends the others away. The result says whether any came."""
    units = [Unit(network.modules(), recorder) for network in networks.values()]
    for network, unit in zip(networks.values(), units, strict=True):
        entry = _Entry(unit, units)
        network._hf_hook = entry  # type: ignore[assignment]
        network.register_forward_pre_hook(entry.enter)
    return lambda: sum(unit.loads for unit in units) > 0


def one_layer_at_a_time(networks: Mapping[str, torch.nn.Module], recorder: Recorder) -> Callable[[], bool]:
    """`enable_sequential_cpu_offload`: every module with weights of its own has them for its own forward only."""
    units = []
    for module in (module for network in networks.values() for module in network.modules()):
        if module._parameters or module._buffers:
            unit = Unit([module], recorder)
            module.register_forward_pre_hook(lambda _, __, unit=unit: unit.load())
            module.register_forward_hook(lambda _, __, ___, unit=unit: unit.drop())
            units.append(unit)
    return lambda: any(unit.loads for unit in units)
