"""The estimate: what a case would take on a GPU, with no GPU and no weights."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from pytest_vram.cases.case import Case
from pytest_vram.cases.models import Model
from pytest_vram.measure.allocator import MIB, replay, smallest_cap
from pytest_vram.measure.phases import Phases
from pytest_vram.measure.trace import CPU, HOPPER, KEEP_VALUES, OneDevice, Trace, as_meta
from pytest_vram.pipelines.build import (
    Arrived,
    Components,
    assemble,
    build_component,
    call_arguments,
    modules_in_order,
    stored,
    weights_bytes,
)
from pytest_vram.pipelines.optimizations import chosen, gpus_of, torch_dtype
from pytest_vram.pipelines.optimizations.memory import ExpandableSegments
from pytest_vram.records.schema import EXPANDABLE_ASKS_BYTES

CALLS = 2  # after one call the need is up to 13 % too low: small tensors of the second split the first's blocks
STEPS = 2
TOLERANCE = 8 * MIB


@dataclass(frozen=True)
class Estimate:
    """Bytes; `phases` are allocated peaks. On a GPU with room, but for `need`.

    `flops` are the floating-point operations of matrix products and convolutions, of one step in `denoise` and of one
    call in the other phases."""

    weights: int
    allocated_peak: int
    reserved_peak: int
    need: int
    phases: dict[str, int]
    effects: dict[str, str]
    gpus: list[dict[str, int]] = field(default_factory=list)
    flops: dict[str, float] = field(default_factory=dict)


def simulate(model: Model, case: Case, capability: float = HOPPER) -> Estimate:
    """Call the real pipeline twice for two steps on meta tensors, and replay its allocations as a GPU of this compute
    capability would make them. Of several GPUs the figures are those of the one that needs most; `gpus` has each.

    Raises:
        UsageError: where diffusers or transformers lack a class that the model names.
    """
    gpus = gpus_of(case.optimizations)
    if gpus == 1:
        return _on_gpu(model, case, capability, 0)
    if any(optimization.processes for optimization in chosen(case.optimizations)):  # which do the same
        found = [_on_gpu(model, case, capability, 0)] * gpus
    else:
        found = [_on_gpu(model, case, capability, gpu) for gpu in range(gpus)]
    names = ("allocated_peak", "reserved_peak", "need")
    each = [{name: getattr(estimate, name) for name in names} for estimate in found]
    highest = {name: max(gpu[name] for gpu in each) for name in names}
    phases = {name: max(estimate.phases.get(name, 0) for estimate in found) for name in found[0].phases}
    return replace(found[0], **highest, phases=phases, gpus=each)


def _on_gpu(model: Model, case: Case, capability: float, gpu: int) -> Estimate:
    dtype = torch_dtype(case.optimizations)
    optimizations = chosen(case.optimizations)
    offloaded = any(optimization.offloads for optimization in optimizations)
    expandable = ExpandableSegments.name in case.optimizations
    with torch.no_grad():
        with Trace():  # under a trace large tables of positions cost nothing
            components = {name: build_component(part, dtype) for name, part in model.components.items()}
        for module in components.values():
            _to_meta(module)
        changes = [change for o in optimizations if (change := o.prepare(components, model.denoiser))]
        if offloaded:  # in host memory
            for module in modules_in_order(components):
                for change in changes:
                    change(module)
        with OneDevice() as one_device, Trace(capability, gpu) as trace:
            one_device.compute = trace.compute
            pipe: Any = assemble(model, components, _execution_device=property(lambda _: CPU))
            if not offloaded:
                places = {name: at for o in optimizations for name, at in o.gpu_of(components).items()}
                _arrive({n: part for n, part in components.items() if places.get(n, gpu) == gpu}, changes, trace)
            weights = weights_bytes(components)
            seen = {o.name: o.simulate(pipe, model.denoiser, trace) for o in optimizations}
            phases = Phases(pipe, model.denoiser, trace.enter, decoder=model.decoder)
            arguments = call_arguments(pipe, case.model_copy(update={"steps": STEPS}), None)
            for _ in range(CALLS):
                phases.begin()
                pipe(**arguments)
        effects = {name: "applied" if took_effect() else "no_effect" for name, took_effect in seen.items()}
    free = replay(trace.events, expandable=expandable)
    most = free.reserved_peak + (EXPANDABLE_ASKS_BYTES if expandable else 0)
    need = smallest_cap(trace.events, trace.peak - MIB, most, TOLERANCE, expandable)
    return Estimate(
        weights=weights,
        allocated_peak=free.allocated_peak,
        reserved_peak=free.reserved_peak,
        need=need,
        phases=free.phases,
        effects=effects,
        flops={n: flops / CALLS / (STEPS if n == "denoise" else 1) for n, flops in trace.flops.items() if n != "load"},
    )


def _arrive(components: Components, changes: Sequence[Arrived], trace: Trace) -> None:
    """The weights come, and each module is changed before the next one has its own, as `fill` does it."""
    for module in modules_in_order(components):
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            for part in stored(tensor) if tensor is not None else ():
                trace.track(part)
        for change in changes:
            change(module)


def _to_meta(module: torch.nn.Module) -> None:
    """Weights, of which small ones would be computed with, and large buffers; tied weights stay tied."""
    made: dict[int, torch.nn.Parameter] = {}
    for submodule in module.modules():
        for name, weight in submodule._parameters.items():
            if weight is not None and not weight.is_meta:
                if id(weight) not in made:
                    made[id(weight)] = torch.nn.Parameter(as_meta(weight), requires_grad=False)
                submodule._parameters[name] = made[id(weight)]
        for name, buffer in submodule._buffers.items():
            if buffer is not None and buffer.numel() > KEEP_VALUES:
                submodule._buffers[name] = as_meta(buffer)
