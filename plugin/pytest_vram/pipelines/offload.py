"""Offload with no GPU: the comings and goings of the weights, told to a recorder as accelerate's hooks make them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch

from pytest_vram.pipelines.build import modules_in_order


class Recorder(Protocol):
    """Where memory on the simulated GPU is taken and given back."""

    def empty_cache(self) -> None: ...

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
                if tensor is not None:
                    move(tensor)

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

    def __init__(self, unit: Unit, units: Iterable[Unit]) -> None:
        self.unit, self.units = unit, units

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        if not self.unit.loaded:
            for other in self.units:
                other.drop()
            self.unit.recorder.empty_cache()
            self.unit.load()
        return args, kwargs

    def enter(self, module: Any, _: Any) -> None:
        self.pre_forward(module)


def one_network_at_a_time(networks: Mapping[str, torch.nn.Module], recorder: Recorder) -> Callable[[], bool]:
    """`enable_model_cpu_offload`: entering a network sends the others away. The result says whether any came."""
    units = [Unit(list(modules_in_order({name: network})), recorder) for name, network in networks.items()]
    for network, unit in zip(networks.values(), units, strict=True):
        entry = _Entry(unit, units)
        network._hf_hook = entry  # type: ignore[assignment]
        network.register_forward_pre_hook(entry.enter)
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
