"""The optimizations: for each one what it applies, what it excludes, and how it is seen to take effect.

To add one, write a class in the module it belongs to and put it in `_REGISTRY`; its place there is its place in
a case's id. These modules are imported while tests are collected, so torch is imported only inside the methods.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pytest_vram.errors import unknown
from pytest_vram.pipelines.optimizations import (
    arithmetic,
    attention,
    caches,
    compiling,
    encoders,
    memory,
    parallel,
    quantization,
    vae,
)
from pytest_vram.pipelines.optimizations.base import Optimization

if TYPE_CHECKING:
    import torch

_REGISTRY: tuple[Optimization, ...] = (
    arithmetic.Fp32(),
    arithmetic.Fp16(),
    arithmetic.Bf16(),
    attention.AttentionSlicing(),
    attention.AttentionNativeMath(),
    attention.AttentionNativeEfficient(),
    attention.AttentionNativeFlash(),
    attention.AttentionNativeCudnn(),
    attention.AttentionFlash(),
    attention.AttentionSage(),
    attention.AttentionXformers(),
    vae.VaeSlicing(),
    vae.VaeTiling(),
    vae.TinyVae(),
    arithmetic.ChannelsLast(),
    arithmetic.FusedQkv(),
    arithmetic.Tf32(),
    compiling.Compile(),
    compiling.CompileBlocks(),
    quantization.LayerwiseCasting(),
    quantization.Int8WeightOnly(),
    quantization.Fp8WeightOnly(),
    quantization.Int4WeightOnly(),
    quantization.Fp8Dynamic(),
    quantization.Bnb8Bit(),
    quantization.Bnb4Bit(),
    quantization.QuantoInt8(),
    quantization.GgufQ80(),
    quantization.GgufQ4K(),
    caches.CacheFirstBlock(),
    caches.CachePyramidAttention(),
    caches.CacheFaster(),
    caches.CacheTaylorSeer(),
    caches.CacheMag(),
    encoders.TextEncodersOnCpu(),
    encoders.TextEncodersDropped(),
    memory.ModelOffload(),
    memory.SequentialOffload(),
    memory.GroupOffloadBlock(),
    memory.GroupOffloadLeaf(),
    memory.GroupOffloadBlockStream(),
    memory.GroupOffloadLeafStream(),
    memory.GroupOffloadBlockDisk(),
    memory.GroupOffloadLeafDisk(),
    parallel.DeviceMapBalanced(),
    parallel.ContextParallelUlysses(),
    parallel.ContextParallelRing(),
    memory.ExpandableSegments(),
)

OPTIMIZATIONS: Mapping[str, Optimization] = {optimization.name: optimization for optimization in _REGISTRY}


DTYPES = tuple(optimization.name for optimization in _REGISTRY if optimization.dtype)


def parse_optimizations(text: str) -> tuple[str, ...]:
    """The names in `fp16+vae_tiling`, in registry order, each once.

    Raises:
        ValueError: an unknown name, or not exactly one dtype.
    """
    names = [name.strip() for name in text.split("+")]
    for name in names:
        if name not in OPTIMIZATIONS:
            raise ValueError(unknown("optimization", name, OPTIMIZATIONS))
    ordered = tuple(name for name in OPTIMIZATIONS if name in names)
    dtypes = [name for name in ordered if name in DTYPES]
    if len(dtypes) != 1:
        found = " and ".join(dtypes) or "none"
        raise ValueError(f"{text!r} needs exactly one of {', '.join(DTYPES)}, and has {found}")
    return ordered


def excluded(name: str) -> tuple[str, ...]:
    """The flags that cannot be there beside this one, in registry order."""
    this = OPTIMIZATIONS[name]

    def clashes(other: Optimization) -> bool:
        same = this.one_of is not None and this.one_of == other.one_of
        return same or bool({name, this.one_of} & other.excludes or {other.name, other.one_of} & this.excludes)

    return tuple(other.name for other in _REGISTRY if other.name != name and clashes(other))


def impossible(names: Sequence[str], device: str, weights: str = "pretrained", gpus: int | None = None) -> str | None:
    """Why these optimizations cannot run together on `device` ("meta" stands for a GPU) with such weights, or None;
    `gpus` is how many are there, where that is known."""
    for name in names:
        optimization = OPTIMIZATIONS[name]
        if clash := [other for other in excluded(name) if other in names]:
            return f"{name} excludes {', '.join(clash)}"
        if optimization.needs_gpu and device == "cpu":
            return f"{name} needs a GPU"
        if gpus is not None and optimization.gpus > gpus:
            return f"{name} takes {optimization.gpus} GPUs, and torch sees {gpus}"
        if optimization.trained and weights == "random":
            return f"{name} decides by the values it sees: --vram-weights pretrained"
        if optimization.trained and device == "meta":
            return f"{name} decides by the values it sees: there is no estimate"
    return None


def chosen(names: Sequence[str]) -> list[Optimization]:
    """The optimizations of these names."""
    return [OPTIMIZATIONS[name] for name in names]


def plain(names: Sequence[str]) -> tuple[str, ...]:
    """The dtype among these names, alone."""
    return tuple(name for name in names if name in DTYPES)


def claims_exact(names: Sequence[str]) -> bool:
    """Whether all flags beside the dtype claim to leave the image as it is."""
    return all(OPTIMIZATIONS[name].exact for name in names if name not in DTYPES)


def gpus_of(names: Sequence[str]) -> int:
    """How many GPUs a case with these optimizations takes."""
    return max((OPTIMIZATIONS[name].gpus for name in names), default=1)


def torch_dtype(names: Sequence[str]) -> "torch.dtype":
    """The dtype among these names."""
    import torch

    name = next(optimization.dtype for optimization in chosen(names) if optimization.dtype)
    dtype: torch.dtype = getattr(torch, name)
    return dtype
