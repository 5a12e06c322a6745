"""The optimizations: for each one what it applies, what it excludes, and how it is seen to take effect.

To add one, write a class below and put it in `_REGISTRY`; its place there is its place in a case's id. This module is
imported while tests are collected, so torch is imported only inside the methods.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_vram.errors import unknown

if TYPE_CHECKING:
    import torch

    from pytest_vram.pipelines.offload import Recorder

Seen = Callable[[], bool]


class Optimization:
    """One flag. The defaults are those of a flag that changes the finished pipeline and nothing else."""

    name: ClassVar[str]
    summary: ClassVar[str]
    excludes: ClassVar[frozenset[str]] = frozenset()
    dtype: ClassVar[str | None] = None
    environ: ClassVar[Mapping[str, str]] = {}
    offloads: ClassVar[bool] = False  # the weights start in host memory
    needs_gpu: ClassVar[bool] = False
    exact: ClassVar[bool] = False  # claims to leave the image as it is

    def apply(self, pipe: Any) -> None:
        """Change the pipeline, whose networks are in place."""

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        """Look on from before the first call; the result says afterwards whether the flag took effect."""
        raise NotImplementedError

    def simulate(self, pipe: Any, denoiser: str, recorder: "Recorder") -> Seen:
        """What `apply` and `watch` do, on a pipeline of meta tensors whose memory `recorder` records."""
        self.apply(pipe)
        return self.watch(pipe, denoiser)


class _Dtype(Optimization):
    def watch(self, pipe: Any, denoiser: str) -> Seen:
        import torch

        network = getattr(pipe, denoiser)
        wanted = getattr(torch, self.dtype or "")
        return lambda: network.dtype == wanted


class Fp32(_Dtype):
    name = "fp32"
    summary = "weights and arithmetic in float32"
    dtype = "float32"


class Fp16(_Dtype):
    name = "fp16"
    summary = "weights and arithmetic in float16"
    dtype = "float16"


class Bf16(_Dtype):
    name = "bf16"
    summary = "weights and arithmetic in bfloat16"
    dtype = "bfloat16"


class AttentionSlicing(Optimization):
    name = "attention_slicing"
    exact = True
    summary = "attention in slices of heads; it replaces the fused attention, so check that it saves anything"

    def apply(self, pipe: Any) -> None:
        pipe.enable_attention_slicing()

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        ran: set[str] = set()
        attention = (module for module in getattr(pipe, denoiser).modules() if hasattr(module, "processor"))
        if first := next(attention, None):
            first.register_forward_pre_hook(lambda module, _: ran.add(type(module.processor).__name__))
        return lambda: any("Sliced" in name for name in ran)


class VaeSlicing(Optimization):
    name = "vae_slicing"
    exact = True
    summary = "the VAE decodes one image of the batch at a time"

    def apply(self, pipe: Any) -> None:
        pipe.vae.enable_slicing()

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        batches = _batches_of(pipe.vae, "decode")
        slices = _batches_of(pipe.vae, "_decode")
        return lambda: bool(slices) and max(slices) < max(batches)


class VaeTiling(Optimization):
    name = "vae_tiling"
    exact = True
    summary = "the VAE decodes overlapping tiles; nothing happens below its tile size"

    def apply(self, pipe: Any) -> None:
        pipe.vae.enable_tiling()

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        tiled = _batches_of(pipe.vae, "tiled_decode")
        return lambda: bool(tiled)


class ChannelsLast(Optimization):
    name = "channels_last"
    exact = True
    summary = "the convolutions of denoiser and VAE in NHWC memory format"

    def apply(self, pipe: Any) -> None:
        import torch

        for network in (getattr(pipe, "unet", None), getattr(pipe, "transformer", None), pipe.vae):
            if network is not None:
                network.to(memory_format=torch.channels_last)

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        import torch

        formats: list[bool] = []

        def note(_: Any, __: Any, output: "torch.Tensor") -> None:
            formats.append(output.is_contiguous(memory_format=torch.channels_last) and not output.is_contiguous())

        convolutions = (module for module in getattr(pipe, denoiser).modules() if isinstance(module, torch.nn.Conv2d))
        if first := next(convolutions, None):
            first.register_forward_hook(note)
        return lambda: any(formats)


class ModelOffload(Optimization):
    name = "model_offload"
    exact = True
    summary = "one network at a time on the GPU, the others in host memory"
    excludes = frozenset({"sequential_offload"})
    offloads = True
    needs_gpu = True

    def apply(self, pipe: Any) -> None:
        pipe.enable_model_cpu_offload()

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        from pytest_vram.pipelines.build import networks

        alone: list[bool] = []
        others = [network for name, network in networks(pipe).items() if name != denoiser]

        def note(*_: Any) -> None:
            alone.append(all(next(network.parameters()).device.type == "cpu" for network in others))

        getattr(pipe, denoiser).register_forward_hook(note)
        return lambda: bool(alone) and all(alone)

    def simulate(self, pipe: Any, denoiser: str, recorder: "Recorder") -> Seen:
        from pytest_vram.pipelines.build import networks
        from pytest_vram.pipelines.offload import one_network_at_a_time

        return one_network_at_a_time(networks(pipe), recorder)


class SequentialOffload(Optimization):
    name = "sequential_offload"
    exact = True
    summary = "one layer at a time on the GPU, everything else in host memory: the least VRAM, the most time"
    excludes = frozenset({"model_offload"})
    offloads = True
    needs_gpu = True

    def apply(self, pipe: Any) -> None:
        pipe.enable_sequential_cpu_offload()

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        away: list[bool] = []

        def note(module: "torch.nn.Module", *_: Any) -> None:
            away.append(next(module.parameters()).is_meta)

        getattr(pipe, denoiser).register_forward_hook(note)
        return lambda: bool(away) and all(away)

    def simulate(self, pipe: Any, denoiser: str, recorder: "Recorder") -> Seen:
        from pytest_vram.pipelines.build import networks
        from pytest_vram.pipelines.offload import one_layer_at_a_time

        return one_layer_at_a_time(networks(pipe), recorder)


class ExpandableSegments(Optimization):
    name = "expandable_segments"
    exact = True
    summary = "PyTorch's allocator grows its segments in place, so that less is lost to fragmentation"
    environ = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    needs_gpu = True

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        import torch

        return lambda: any(segment.get("is_expandable") for segment in torch.cuda.memory_snapshot())

    def simulate(self, pipe: Any, denoiser: str, recorder: "Recorder") -> Seen:
        return lambda: True  # it is the model of the allocator that changes, not the pipeline


_REGISTRY: tuple[Optimization, ...] = (
    Fp32(),
    Fp16(),
    Bf16(),
    AttentionSlicing(),
    VaeSlicing(),
    VaeTiling(),
    ChannelsLast(),
    ModelOffload(),
    SequentialOffload(),
    ExpandableSegments(),
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


def impossible(names: Sequence[str], device: str) -> str | None:
    """Why these optimizations cannot run together on `device` ("meta" stands for a GPU), or None."""
    for name in names:
        optimization = OPTIMIZATIONS[name]
        if clash := [other for other in names if other in optimization.excludes]:
            return f"{name} excludes {', '.join(clash)}"
        if optimization.needs_gpu and device == "cpu":
            return f"{name} needs a GPU"
    return None


def chosen(names: Sequence[str]) -> list[Optimization]:
    """The optimizations of these names."""
    return [OPTIMIZATIONS[name] for name in names]


def without_exact(names: Sequence[str]) -> tuple[str, ...]:
    """These names without those that claim to leave the image as it is."""
    return tuple(name for name in names if not OPTIMIZATIONS[name].exact)


def torch_dtype(names: Sequence[str]) -> "torch.dtype":
    """The dtype among these names."""
    import torch

    name = next(optimization.dtype for optimization in chosen(names) if optimization.dtype)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _batches_of(module: Any, method: str) -> list[int]:
    """The batch size of every call of `module.method` from now on."""
    batches: list[int] = []
    original = getattr(module, method, None)

    def noting(sample: "torch.Tensor", *args: Any, **kwargs: Any) -> Any:
        batches.append(sample.shape[0])
        return original(sample, *args, **kwargs)  # type: ignore[misc]

    if original is not None:
        setattr(module, method, noting)
    return batches
