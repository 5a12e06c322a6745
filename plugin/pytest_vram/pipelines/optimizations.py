"""The optimizations: for each one what it applies, what it excludes, and how it is seen to take effect.

To add one, write a class below and put it in `_REGISTRY`; its place there is its place in a case's id. This module is
imported while tests are collected, so torch is imported only inside the methods.
"""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_vram.errors import Inapplicable, unknown

if TYPE_CHECKING:
    import torch

    from pytest_vram.pipelines.offload import Recorder

Seen = Callable[[], bool]

TINY_VAES = {  # latent channels and scaling factor of the VAE that each replaces
    (4, 0.18215): "madebyollin/taesd",
    (4, 0.13025): "madebyollin/taesdxl",
    (16, 1.5305): "madebyollin/taesd3",
    (16, 0.3611): "madebyollin/taef1",
}


class Optimization:
    """One flag. The defaults are those of a flag that changes the finished pipeline and nothing else."""

    name: ClassVar[str]
    summary: ClassVar[str]
    excludes: ClassVar[frozenset[str]] = frozenset()
    one_of: ClassVar[str | None] = None  # of the flags that are one of the same a case has one
    dtype: ClassVar[str | None] = None
    environ: ClassVar[Mapping[str, str]] = {}
    offloads: ClassVar[bool] = False  # the weights start in host memory
    needs_gpu: ClassVar[bool] = False
    trained: ClassVar[bool] = False  # decides by the values it sees: needs trained weights, and cannot be estimated
    replaces: ClassVar[bool] = False  # puts a network with weights of its own in place of another
    exact: ClassVar[bool] = False  # claims to leave the image as it is

    def prepare(self, networks: "dict[str, torch.nn.Module]", denoiser: str) -> "Callable[[Any], None] | None":
        """Change the networks, or put others in their place, before they have weights on the GPU. The result is called
        with each of their modules when it has its own, before the next one has.

        Raises:
            Inapplicable: when this pipeline cannot take it.
        """

    def apply(self, pipe: Any, denoiser: str) -> None:
        """Change the pipeline, whose networks are in place.

        Raises:
            Inapplicable: when this pipeline cannot take it.
        """

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        """Look on from before the first call; the result says afterwards whether the flag took effect."""
        raise NotImplementedError

    def simulate(self, pipe: Any, denoiser: str, recorder: "Recorder") -> Seen:
        """What `apply` and `watch` do, on a pipeline of meta tensors whose memory `recorder` records."""
        self.apply(pipe, denoiser)
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
    one_of = "attention backends"  # its processors replace those that ask for a backend
    exact = True
    summary = "attention in slices of heads; it replaces the fused attention, so check that it saves anything"

    def apply(self, pipe: Any, denoiser: str) -> None:
        taken(pipe, "enable_attention_slicing")()

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        ran: set[str] = set()
        attention = (module for module in getattr(pipe, denoiser).modules() if hasattr(module, "processor"))
        if first := next(attention, None):
            first.register_forward_pre_hook(lambda module, _: ran.add(type(module.processor).__name__))
        return lambda: any("Sliced" in name for name in ran)


class _Attention(Optimization):
    """A backend of diffusers' attention; models whose attention does not ask for one ignore it."""

    backend: ClassVar[str]
    package: ClassVar[str] = ""  # that it needs
    install: ClassVar[str] = ""  # the command that brings it
    needs_gpu = True
    one_of = "attention backends"

    def apply(self, pipe: Any, denoiser: str) -> None:
        for network in denoisers(pipe, denoiser):
            try:
                taken(network, "set_attention_backend")(self.backend)
            except (RuntimeError, ImportError) as error:  # what it needs is not here, or too old
                missing = self.package and find_spec(self.package) is None
                why = f"it needs a package: {self.install}" if missing else " ".join(str(error).split())
                raise Inapplicable(f"{self.name}: {why}") from None

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        ran: set[Any] = set()

        def note(module: Any, *_: Any) -> None:
            ran.add(getattr(module.processor, "_attention_backend", None))

        for network in denoisers(pipe, denoiser):
            for module in network.modules():
                if hasattr(module, "processor"):
                    module.register_forward_pre_hook(note)
        return lambda: self.backend in ran


class AttentionNativeMath(_Attention):
    name = "attention_native_math"
    backend = "_native_math"
    summary = "PyTorch's attention without a fused kernel: what a fused one saves"


class AttentionNativeEfficient(_Attention):
    name = "attention_native_efficient"
    backend = "_native_efficient"
    summary = "PyTorch's memory-efficient kernel"


class AttentionNativeFlash(_Attention):
    name = "attention_native_flash"
    backend = "_native_flash"
    summary = "PyTorch's FlashAttention kernel"


class AttentionNativeCudnn(_Attention):
    name = "attention_native_cudnn"
    backend = "_native_cudnn"
    summary = "cuDNN's fused kernel"


class AttentionFlash(_Attention):
    name = "attention_flash"
    backend = "flash"
    package = "flash_attn"
    install = "pip install flash-attn"
    summary = "FlashAttention 2 of the package flash-attn"


class AttentionSage(_Attention):
    name = "attention_sage"
    backend = "sage"
    package = "sageattention"
    install = "pip install sageattention"
    summary = "SageAttention, in 8 bits"


class AttentionXformers(_Attention):
    name = "attention_xformers"
    backend = "xformers"
    package = "xformers"
    install = "pip install xformers"
    summary = "xFormers' memory-efficient kernel"


class VaeSlicing(Optimization):
    name = "vae_slicing"
    exact = True
    summary = "the VAE decodes one image of the batch at a time"

    def apply(self, pipe: Any, denoiser: str) -> None:
        taken(taken(pipe, "vae"), "enable_slicing")()

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        batches = _batches_of(pipe.vae, "decode")
        parts = (pipe.vae, "_decode") if hasattr(pipe.vae, "_decode") else (pipe.vae.decoder, "forward")
        slices = _batches_of(*parts)
        return lambda: bool(slices) and max(slices) < max(batches)


class VaeTiling(Optimization):
    name = "vae_tiling"
    exact = True
    summary = "the VAE decodes overlapping tiles; nothing happens below its tile size"

    def apply(self, pipe: Any, denoiser: str) -> None:
        taken(taken(pipe, "vae"), "enable_tiling")()

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        tiled = _batches_of(pipe.vae, "tiled_decode" if hasattr(pipe.vae, "tiled_decode") else "_tiled_decode")
        return lambda: bool(tiled)


class TinyVae(Optimization):
    name = "tiny_vae"
    summary = "a distilled VAE of a few megabytes in place of the model's own; another image"
    replaces = True

    def prepare(self, networks: "dict[str, torch.nn.Module]", denoiser: str) -> None:
        import diffusers

        from pytest_vram.cases.models import Component
        from pytest_vram.pipelines.build import build_component

        vae: Any = networks.get("vae")
        if not isinstance(vae, diffusers.AutoencoderKL):
            raise Inapplicable("tiny_vae: there is none for this model's VAE")
        config = {"latent_channels": vae.config.latent_channels}
        hub_id = TINY_VAES.get((vae.config.latent_channels, vae.config.scaling_factor))
        if hub_id is None:
            raise Inapplicable(f"tiny_vae: none has latents of {config['latent_channels']} channels and this scale")
        if vae.device.type == "meta":
            part = {"library": "diffusers", "class": "AutoencoderTiny", "config": config}
            networks["vae"] = build_component(Component.model_validate(part), vae.dtype)
        else:
            tiny = diffusers.AutoencoderTiny
            networks["vae"] = tiny.from_pretrained(hub_id, dtype=vae.dtype, use_safetensors=True)

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        decoded = _batches_of(pipe.vae, "decode")
        return lambda: bool(decoded) and type(pipe.vae).__name__ == "AutoencoderTiny"


class ChannelsLast(Optimization):
    name = "channels_last"
    exact = True
    summary = "the convolutions of denoiser and VAE in NHWC memory format"

    def apply(self, pipe: Any, denoiser: str) -> None:
        import torch

        for network in (*denoisers(pipe, denoiser), *denoisers(pipe, "vae")):
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


class FusedQkv(Optimization):
    name = "fused_qkv"
    exact = True
    summary = "query, key and value of the denoiser's attention as one matrix product; the old weights stay"
    excludes = frozenset({"attention_slicing"})  # each puts attention processors of its own in place

    def apply(self, pipe: Any, denoiser: str) -> None:
        for network in denoisers(pipe, denoiser):
            try:
                taken(network, "fuse_qkv_projections")()
            except ValueError as error:
                raise Inapplicable(f"{self.name}: {' '.join(str(error).split())}") from None

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        networks = denoisers(pipe, denoiser)
        return lambda: all(any(getattr(m, "fused_projections", False) for m in n.modules()) for n in networks)


class Tf32(Optimization):
    name = "tf32"
    summary = "matrix products of float32 in TensorFloat-32; other dtypes have none"
    needs_gpu = True

    def apply(self, pipe: Any, denoiser: str) -> None:
        import torch

        torch.backends.cuda.matmul.allow_tf32 = True

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        import torch

        network = getattr(pipe, denoiser)
        return lambda: network.dtype == torch.float32

    def simulate(self, pipe: Any, denoiser: str, recorder: "Recorder") -> Seen:
        return self.watch(pipe, denoiser)  # products take no other memory


class LayerwiseCasting(Optimization):
    name = "layerwise_casting"
    summary = "the denoiser's weights rest in float8 and are cast, layer by layer, when they are used"
    one_of = "precisions of the weights"
    excludes = frozenset({"sequential_offload", "fused_qkv"})

    def prepare(self, networks: "dict[str, torch.nn.Module]", denoiser: str) -> None:
        import torch

        for network in denoisers(networks, denoiser):
            network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=network.dtype)

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        import torch

        networks = denoisers(pipe, denoiser)
        return lambda: all(any(p.dtype == torch.float8_e4m3fn for p in n.parameters()) for n in networks)


class _WeightOnly(Optimization):
    """Quantization by torchao: the weights of the denoiser's linear layers, each as it comes; arithmetic stays."""

    config: ClassVar[str]
    one_of = "precisions of the weights"
    excludes = frozenset({
        "sequential_offload", "fused_qkv",
        "group_offload_block", "group_offload_leaf", "group_offload_block_stream", "group_offload_leaf_stream",
    })  # fmt: skip

    def prepare(self, networks: "dict[str, torch.nn.Module]", denoiser: str) -> "Callable[[Any], None]":
        import torch

        try:
            from torchao import quantization
        except ImportError:
            raise Inapplicable(f"{self.name}: it needs a package: pip install torchao") from None
        config = getattr(quantization, self.config)()
        parts = denoisers(networks, denoiser)
        dtypes = {m: n.dtype for n in parts for m in n.modules() if isinstance(m, torch.nn.Linear)}

        def quantize(module: Any) -> None:
            if module in dtypes and module.weight.dtype == dtypes[module]:  # what is kept in float32 stays so
                quantization.quantize_(torch.nn.Sequential(module), config)

        return quantize

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        from torch.utils._python_dispatch import is_traceable_wrapper_subclass

        networks = denoisers(pipe, denoiser)
        return lambda: all(any(is_traceable_wrapper_subclass(p) for p in n.parameters()) for n in networks)


class Int8WeightOnly(_WeightOnly):
    name = "int8_weight_only"
    summary = "the weights of the denoiser's linear layers in int8, by torchao"
    config = "Int8WeightOnlyConfig"


class Fp8WeightOnly(_WeightOnly):
    name = "fp8_weight_only"
    summary = "the weights of the denoiser's linear layers in float8, by torchao"
    config = "Float8WeightOnlyConfig"


class _Cache(Optimization):
    """A cache of diffusers: outputs of the denoiser's parts are used again in the next steps."""

    config: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}  # as diffusers' documentation has them
    by_timestep: ClassVar[bool] = False
    one_of = "caches"
    trained = True

    def apply(self, pipe: Any, denoiser: str) -> None:
        import diffusers

        more = {"current_timestep_callback": lambda: pipe.current_timestep} if self.by_timestep else {}
        for network in denoisers(pipe, denoiser):
            enable, config = taken(network, "enable_cache"), taken(diffusers, self.config)
            enable(config(**self.options, **more, **self.of(network)))

    def of(self, network: Any) -> Mapping[str, Any]:
        """The options that depend on the network."""
        return {}

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        """That it is on; whether it left anything out its hooks do not say."""
        return lambda: all(network.is_cache_enabled for network in denoisers(pipe, denoiser))


class CacheFirstBlock(_Cache):
    name = "cache_first_block"
    summary = "FirstBlockCache: the rest is left out where the first block's output hardly changed"
    config = "FirstBlockCacheConfig"


class CachePyramidAttention(_Cache):
    name = "cache_pyramid_attention"
    summary = "Pyramid Attention Broadcast: attention is computed in every other step"
    config = "PyramidAttentionBroadcastConfig"
    options = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (100, 800)}
    by_timestep = True


class CacheFaster(_Cache):
    name = "cache_faster"
    summary = "FasterCache: attention and the unconditional branch are computed in some steps"
    config = "FasterCacheConfig"
    by_timestep = True

    def of(self, network: Any) -> Mapping[str, Any]:
        return {"is_guidance_distilled": bool(network.config.get("guidance_embeds"))}


class CacheTaylorSeer(_Cache):
    name = "cache_taylorseer"
    summary = "TaylorSeer: outputs are predicted from those of earlier steps"
    config = "TaylorSeerCacheConfig"


class ModelOffload(Optimization):
    name = "model_offload"
    exact = True
    summary = "one network at a time on the GPU, the others in host memory"
    one_of = "offloads"
    offloads = True
    needs_gpu = True

    def apply(self, pipe: Any, denoiser: str) -> None:
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
    one_of = "offloads"
    offloads = True
    needs_gpu = True

    def apply(self, pipe: Any, denoiser: str) -> None:
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


class _GroupOffload(Optimization):
    """diffusers' group offload. What it cannot take, such as most VAEs by blocks, stays on the GPU."""

    exact = True
    one_of = "offloads"
    offloads = True
    needs_gpu = True
    leaf: ClassVar[bool]
    stream: ClassVar[bool] = False

    def _left_out(self, pipe: Any, denoiser: str) -> list[str]:
        import torch

        from pytest_vram.pipelines.build import networks
        from pytest_vram.pipelines.offload import ungroupable

        vae: Any = getattr(pipe, "vae", None)
        if self.stream and hasattr(pipe, "upcast_vae") and vae.dtype == torch.float16 and vae.config.force_upcast:
            raise Inapplicable(f"{self.name}: its pinned copies undo the cast of the VAE to float32")
        reasons = {name: ungroupable(network, leaf=self.leaf) for name, network in networks(pipe).items()}
        if reason := reasons.get(denoiser):
            raise Inapplicable(f"{self.name}: {reason}")
        return [name for name, reason in reasons.items() if reason]

    def apply(self, pipe: Any, denoiser: str) -> None:
        import torch

        taken(pipe, "enable_group_offload")(
            onload_device=torch.device("cuda"),
            offload_type="leaf_level" if self.leaf else "block_level",
            num_blocks_per_group=None if self.leaf else 1,
            use_stream=self.stream,
            exclude_modules=self._left_out(pipe, denoiser),
        )

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        away: list[bool] = []

        def note(module: "torch.nn.Module", *_: Any) -> None:
            away.append(any(parameter.device.type == "cpu" for parameter in module.parameters()))

        getattr(pipe, denoiser).register_forward_hook(note)
        return lambda: bool(away) and all(away)

    def simulate(self, pipe: Any, denoiser: str, recorder: "Recorder") -> Seen:
        from pytest_vram.pipelines.build import networks
        from pytest_vram.pipelines.offload import groups_at_a_time

        left_out = self._left_out(pipe, denoiser)
        return groups_at_a_time(networks(pipe), recorder, leaf=self.leaf, stream=self.stream, exclude=left_out)


class GroupOffloadBlock(_GroupOffload):
    name = "group_offload_block"
    summary = "one block of a network at a time on the GPU"
    leaf = False


class GroupOffloadLeaf(_GroupOffload):
    name = "group_offload_leaf"
    summary = "one layer at a time on the GPU"
    leaf = True


class GroupOffloadBlockStream(_GroupOffload):
    name = "group_offload_block_stream"
    summary = "one block of a network at a time on the GPU, the next one copied meanwhile; host memory is pinned"
    leaf = False
    stream = True


class GroupOffloadLeafStream(_GroupOffload):
    name = "group_offload_leaf_stream"
    summary = "one layer at a time on the GPU, the next one copied meanwhile; host memory is pinned"
    leaf = True
    stream = True


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
    AttentionNativeMath(),
    AttentionNativeEfficient(),
    AttentionNativeFlash(),
    AttentionNativeCudnn(),
    AttentionFlash(),
    AttentionSage(),
    AttentionXformers(),
    VaeSlicing(),
    VaeTiling(),
    TinyVae(),
    ChannelsLast(),
    FusedQkv(),
    Tf32(),
    LayerwiseCasting(),
    Int8WeightOnly(),
    Fp8WeightOnly(),
    CacheFirstBlock(),
    CachePyramidAttention(),
    CacheFaster(),
    CacheTaylorSeer(),
    ModelOffload(),
    SequentialOffload(),
    GroupOffloadBlock(),
    GroupOffloadLeaf(),
    GroupOffloadBlockStream(),
    GroupOffloadLeafStream(),
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


def excluded(name: str) -> tuple[str, ...]:
    """The flags that cannot be there beside this one, in registry order."""
    this = OPTIMIZATIONS[name]

    def clashes(other: Optimization) -> bool:
        same = this.one_of is not None and this.one_of == other.one_of
        return same or name in other.excludes or other.name in this.excludes

    return tuple(other.name for other in _REGISTRY if other.name != name and clashes(other))


def impossible(names: Sequence[str], device: str, weights: str = "pretrained") -> str | None:
    """Why these optimizations cannot run together on `device` ("meta" stands for a GPU) with such weights, or None."""
    for name in names:
        optimization = OPTIMIZATIONS[name]
        if clash := [other for other in excluded(name) if other in names]:
            return f"{name} excludes {', '.join(clash)}"
        if optimization.needs_gpu and device == "cpu":
            return f"{name} needs a GPU"
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


def torch_dtype(names: Sequence[str]) -> "torch.dtype":
    """The dtype among these names."""
    import torch

    name = next(optimization.dtype for optimization in chosen(names) if optimization.dtype)
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def taken(owner: Any, name: str) -> Any:
    """This method or part, which not every class has.

    Raises:
        Inapplicable: naming the class that lacks it.
    """
    found = getattr(owner, name, None)
    if found is None:
        raise Inapplicable(f"{type(owner).__name__} has no {name}")
    return found


def denoisers(owner: Any, name: str) -> list[Any]:
    """The denoiser of a pipeline, or of networks by name; some have a second one, for the steps with less noise."""
    parts = owner if isinstance(owner, dict) else {part: getattr(owner, part, None) for part in (name, f"{name}_2")}
    return [network for part in (name, f"{name}_2") if (network := parts.get(part)) is not None]


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
