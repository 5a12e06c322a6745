"""The denoiser's weights in fewer bits."""

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar
from unittest.mock import patch

from pytest_vram.errors import Inapplicable
from pytest_vram.pipelines.optimizations.base import Optimization, Seen, denoisers

if TYPE_CHECKING:
    import torch

    from pytest_vram.pipelines.offload import Recorder

GGUF_ELEMENTS = 1 << 23  # quantized at a time: in float32, of which a few copies are made, 32 MiB


class LayerwiseCasting(Optimization):
    name = "layerwise_casting"
    call = "pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)"
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


class _Quantized(Optimization):
    """The weights of the denoiser's linear layers, each as it comes; what is kept in float32 stays so."""

    one_of = "precisions of the weights"
    excludes = frozenset({
        "sequential_offload", "fused_qkv",
        "group_offload_block", "group_offload_leaf", "group_offload_block_stream", "group_offload_leaf_stream",
        "group_offload_block_disk", "group_offload_leaf_disk",
    })  # fmt: skip
    travels: ClassVar[bool] = True  # a layer that waits in host memory goes to the GPU to be quantized, and back

    def load(self) -> None:
        """Import what it takes."""
        raise NotImplementedError

    def replace(self, linear: "torch.nn.Linear", dtype: "torch.dtype") -> Any:
        """The layer that takes this one's place, or None where it stays as it is; its weight may have come or not."""
        return linear

    def quantize(self, layer: Any) -> None:
        """What happens to the layer when its weight has come."""
        raise NotImplementedError

    def prepare(self, networks: "dict[str, torch.nn.Module]", denoiser: str) -> "Callable[[Any], None]":
        import torch
        from torch.nn.modules.linear import NonDynamicallyQuantizableLinear  # its weight is used without calling it

        try:
            self.load()
        except ImportError:
            raise Inapplicable(f"{self.name}: it needs a package: pip install {self.package}") from None
        made: dict[Any, Any] = {}
        for network in denoisers(networks, denoiser):
            dtype = network.dtype
            for parent in tuple(network.modules()):
                for name, child in parent.named_children():
                    if not isinstance(child, torch.nn.Linear) or isinstance(child, NonDynamicallyQuantizableLinear):
                        continue
                    if child not in made and child.weight.dtype == dtype:
                        made[child] = self.replace(child, dtype)
                    if made.get(child):
                        parent._modules[name] = made[child]
        layers = set(made.values())

        def quantize(module: Any) -> None:
            if module not in layers:
                return
            away = self.travels and module.weight.device.type == "cpu" and torch.cuda.is_initialized()
            if away:
                module.to("cuda")  # the host would take minutes, and some kernels it has not
            self.quantize(module)
            if away:
                module.to("cpu")

        return quantize

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        """That each network ran with quantized layers. It asks no layer: a compiled one would be compiled again."""
        networks = denoisers(pipe, denoiser)
        ran: set[int] = set()
        for network in networks:
            network.register_forward_hook(lambda network, *_: ran.add(id(network)))
        return lambda: all(
            id(network) in ran and any(_is_quantized(getattr(layer, "weight", None)) for layer in network.modules())
            for network in networks
        )


def _is_quantized(weight: Any) -> bool:
    """Whether it is made of parts, or of packed bytes."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return weight is not None and (is_traceable_wrapper_subclass(weight) or not weight.dtype.is_floating_point)


def _in_place_of(linear: "torch.nn.Linear", layer: Any) -> Any:
    """The layer with the weight and the bias of the other one."""
    layer.weight, layer.bias = linear.weight, linear.bias
    return layer.train(linear.training)


class _Torchao(_Quantized):
    """By torchao, of which a layer keeps its class and gets a weight that knows how to be multiplied."""

    package = "torchao"
    config: ClassVar[str]
    options: ClassVar[Mapping[str, Any]] = {}

    def load(self) -> None:
        from torchao import quantization

        # Nothing is compiled here; torchao before 0.18 would also set TF32.
        self._config = getattr(quantization, self.config)(set_inductor_config=False, **self.options)

    def quantize(self, layer: Any) -> None:
        import torch
        from torchao import quantization

        quantization.quantize_(torch.nn.Sequential(layer), self._config)


class Int8WeightOnly(_Torchao):
    name = "int8_weight_only"
    call = "TorchAoConfig(Int8WeightOnlyConfig())"
    summary = "the weights of the denoiser's linear layers in int8, by torchao"
    config = "Int8WeightOnlyConfig"


class Fp8WeightOnly(_Torchao):
    name = "fp8_weight_only"
    call = "TorchAoConfig(Float8WeightOnlyConfig())"
    summary = "the weights of the denoiser's linear layers in float8, by torchao"
    config = "Float8WeightOnlyConfig"


class _OfCapability(_Torchao):
    """What a GPU must be new enough for. torchao asks the GPU; a weight on the meta device has none to ask."""

    capability: ClassVar[float]
    asks: ClassVar[str]  # the function by which torchao asks
    needs_gpu = True

    def quantize(self, layer: Any) -> None:
        import torch

        if layer.weight.is_meta:
            with patch(self.asks, return_value=(9, 0)):
                super().quantize(layer)
            return
        self._check(float("{}.{}".format(*torch.cuda.get_device_capability())))
        super().quantize(layer)

    def simulate(self, pipe: Any, denoiser: str, recorder: "Recorder") -> Seen:
        self._check(getattr(recorder, "capability", self.capability))
        return super().simulate(pipe, denoiser, recorder)

    def _check(self, capability: float) -> None:
        if capability < self.capability:
            raise Inapplicable(f"{self.name}: needs compute capability {self.capability}, and the GPU has {capability}")


class Int4WeightOnly(_OfCapability):
    """In the packing of PyTorch's own kernels; torchao's default one needs the package mslk. Layers whose inputs are no
    multiple of the group of 128 stay as they are."""

    name = "int4_weight_only"
    call = 'TorchAoConfig(Int4WeightOnlyConfig(int4_packing_format="tile_packed_to_4d"))'
    summary = "the weights of the denoiser's linear layers in int4, by torchao, for PyTorch's tinygemm kernels"
    config = "Int4WeightOnlyConfig"
    options = {"int4_packing_format": "tile_packed_to_4d"}
    capability = 8.0
    asks = "torch.cuda.get_device_capability"

    def replace(self, linear: "torch.nn.Linear", dtype: "torch.dtype") -> Any:
        import torch

        if dtype != torch.bfloat16:
            raise Inapplicable(f"{self.name}: its kernels take bf16 alone")
        return super().replace(linear, dtype)


class Fp8Dynamic(_OfCapability):
    """One scale for a tensor, as torchao and the examples of diffusers have it. Layers whose sizes are no multiples of
    16 stay as they are."""

    name = "fp8_dynamic"
    call = "TorchAoConfig(Float8DynamicActivationFloat8WeightConfig())"
    summary = "weights and inputs of the denoiser's linear layers in float8, multiplied as such, by torchao"
    config = "Float8DynamicActivationFloat8WeightConfig"
    capability = 8.9
    asks = "torchao.quantization.quant_api._check_hardware_support"

    def replace(self, linear: "torch.nn.Linear", dtype: "torch.dtype") -> Any:
        # torchao takes the one scale of such a weight for that of a block, of which the weight has many
        return None if linear.weight.shape == (128, 128) else super().replace(linear, dtype)


class _BitsAndBytes(_Quantized):
    """As diffusers' BitsAndBytesConfig does it, with its defaults but for what a class says."""

    package = "bitsandbytes"

    def load(self) -> None:
        import bitsandbytes as _  # noqa: F401

        # which would say at each call of a layer in 8 bits that it casts bf16 to fp16
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


class Bnb8Bit(_BitsAndBytes):
    name = "bnb_8bit"
    call = "BitsAndBytesConfig(load_in_8bit=True)"
    summary = "weights and inputs of the denoiser's linear layers in int8, outliers apart, by bitsandbytes"
    # Module.to() leaves behind what belongs to the weight; these move networks later than `apply`, which mends it
    excludes = _BitsAndBytes.excludes | {"offloads", "text_encoders_dropped"}
    travels = False

    def replace(self, linear: "torch.nn.Linear", dtype: "torch.dtype") -> Any:
        from bitsandbytes.nn import Linear8bitLt

        sizes = linear.in_features, linear.out_features, linear.bias is not None
        # the threshold is llm_int8_threshold of BitsAndBytesConfig
        return _in_place_of(linear, Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0, device="meta"))

    def quantize(self, layer: Any) -> None:
        from bitsandbytes.nn import Int8Params

        layer.weight = Int8Params(layer.weight.data, requires_grad=False)._quantize(layer.weight.device)

    def apply(self, pipe: Any, denoiser: str) -> None:
        from bitsandbytes.nn import Int8Params

        for network in denoisers(pipe, denoiser):
            for weight in network.parameters():
                if isinstance(weight, Int8Params):  # trained weights are quantized on the host and have moved since
                    weight.CB, weight.SCB = weight.data, weight.SCB.to(weight.device)


class Bnb4Bit(_BitsAndBytes):
    name = "bnb_4bit"
    call = 'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)'
    summary = "the weights of the denoiser's linear layers in NF4, by bitsandbytes"

    def replace(self, linear: "torch.nn.Linear", dtype: "torch.dtype") -> Any:
        from bitsandbytes.nn import Linear4bit

        sizes = linear.in_features, linear.out_features, linear.bias is not None
        options = {"compute_dtype": dtype, "compress_statistics": False, "quant_type": "nf4"}
        return _in_place_of(linear, Linear4bit(*sizes, **options, device="meta"))

    def quantize(self, layer: Any) -> None:
        from bitsandbytes.nn import Params4bit

        options = {"compress_statistics": False, "quant_type": "nf4", "module": layer}
        layer.weight = Params4bit(layer.weight.data, **options)._quantize(layer.weight.device)

    def simulate(self, pipe: Any, denoiser: str, recorder: "Recorder") -> Seen:
        from bitsandbytes.nn import Linear4bit

        for network in denoisers(pipe, denoiser):
            for layer in network.modules():
                if isinstance(layer, Linear4bit):
                    # tensors say here that they are on the CPU, for which the layer would pack its weights anew
                    layer.support_avx512bf16_for_cpu = False
        return super().simulate(pipe, denoiser, recorder)


class QuantoInt8(_Quantized):
    """As diffusers' QuantoConfig does it. In int4 quanto compiles a kernel where it is first used."""

    name = "quanto_int8"
    call = 'QuantoConfig(weights_dtype="int8")'
    summary = "the weights of the denoiser's linear layers in int8, by optimum-quanto"
    package = "optimum-quanto"

    def load(self) -> None:
        from optimum import quanto as _  # noqa: F401

    def replace(self, linear: "torch.nn.Linear", dtype: "torch.dtype") -> Any:
        from accelerate import init_empty_weights
        from optimum.quanto import QLinear, qint8

        sizes = linear.in_features, linear.out_features, linear.bias is not None
        with init_empty_weights():  # leaves the two scales of activations real
            layer = QLinear(*sizes, dtype=dtype, weights=qint8)
        return _in_place_of(linear, layer)

    def quantize(self, layer: Any) -> None:
        layer.freeze()
        layer.weight.requires_grad = False


class _Gguf(_Quantized):
    """In the blocks of a GGUF checkpoint, which diffusers' GGUFLinear takes apart at each call. They are made here, on
    the GPU, from whatever weights there are; a checkpoint's own may be chosen better, and take the same memory."""

    package = "gguf"
    kinds: ClassVar[tuple[str, ...]]  # a layer gets the first whose blocks divide its inputs; without one it stays

    def load(self) -> None:
        import gguf
        from diffusers.quantizers.gguf.utils import GGUFLinear

        self._linear = GGUFLinear
        types = [gguf.GGMLQuantizationType[kind] for kind in self.kinds]
        self._sizes = {kind: gguf.GGML_QUANT_SIZES[kind] for kind in types}

    def _kind(self, linear: Any) -> Any:
        return next((kind for kind, (elements, _) in self._sizes.items() if linear.in_features % elements == 0), None)

    def replace(self, linear: "torch.nn.Linear", dtype: "torch.dtype") -> Any:
        if self._kind(linear) is None:
            return None
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        return _in_place_of(linear, self._linear(*sizes, compute_dtype=dtype, device="meta"))

    def quantize(self, layer: Any) -> None:
        import torch
        from diffusers.quantizers.gguf.utils import GGUFParameter

        kind = self._kind(layer)
        elements, size = self._sizes[kind]
        blocks = layer.weight.data.view(-1, elements)
        packed = torch.empty(len(blocks), size, dtype=torch.uint8, device=blocks.device)
        some = GGUF_ELEMENTS // elements
        for source, target in zip(blocks.split(some), packed.split(some), strict=True):
            target.copy_(torch.cat([part.view(torch.uint8) for part in _PACK[kind.name](source.float())], dim=1))
        layer.weight = GGUFParameter(packed.view(layer.out_features, -1), quant_type=kind)


class GgufQ80(_Gguf):
    name = "gguf_q8_0"
    call = "Transformer.from_single_file(file_in_q8_0, quantization_config=GGUFQuantizationConfig(compute_dtype=dtype))"
    summary = "the weights of the denoiser's linear layers in GGUF's Q8_0, taken apart layer by layer by diffusers"
    kinds = ("Q8_0",)


class GgufQ4K(_Gguf):
    name = "gguf_q4_k"
    call = "Transformer.from_single_file(file_in_q4_k, quantization_config=GGUFQuantizationConfig(compute_dtype=dtype))"
    summary = "the weights of the denoiser's linear layers in GGUF's Q4_K, taken apart layer by layer by diffusers"
    kinds = ("Q4_K", "Q5_0")  # the second where rows are no multiple of 256, as llama.cpp's quantizer falls back


def _q8_0(blocks: "torch.Tensor") -> "list[torch.Tensor]":
    """A float16 scale and 32 int8, as `gguf.quants.Q8_0` has them."""
    import torch

    scale = blocks.abs().amax(1, keepdim=True) / 127
    return [scale.half(), _ratio(blocks, scale).round().to(torch.int8)]


def _q5_0(blocks: "torch.Tensor") -> "list[torch.Tensor]":
    """A float16 scale, the high bits of 32 numbers of 5 bits, and their low ones, as `gguf.quants.Q5_0` has them."""
    import torch

    scale = blocks.gather(1, blocks.abs().argmax(1, keepdim=True)) / -16
    numbers = (_ratio(blocks, scale) + 16.5).clamp(0, 31).to(torch.uint8)
    high = (numbers >> 4).view(-1, 4, 8) << torch.arange(8, dtype=torch.uint8, device=blocks.device)
    low = numbers & 15
    return [scale.half(), high.sum(2, dtype=torch.uint8), low[:, :16] | low[:, 16:] << 4]


def _q4_k(blocks: "torch.Tensor") -> "list[torch.Tensor]":
    """Two float16, by which 8 scales and 8 minima of 6 bits are multiplied, and 256 numbers of 4 bits: the reverse of
    `gguf.quants.Q4_K.dequantize_blocks`."""
    import torch

    parts = blocks.view(-1, 8, 32)
    minima = -parts.amin(2).clamp(max=0)
    scales = (parts.amax(2) + minima) / 15
    units = [(of.amax(1, keepdim=True) / 63).half() for of in (scales, minima)]
    s, m = (_ratio(of, unit.float()).round().clamp(0, 63) for of, unit in zip((scales, minima), units, strict=True))
    shifted = parts + (m * units[1]).unsqueeze(2)
    numbers = _ratio(shifted, (s * units[0]).unsqueeze(2)).round().clamp(0, 15).to(torch.uint8)
    s, m = s.to(torch.uint8), m.to(torch.uint8)
    high = [of[:, :4] | (of[:, 4:] >> 4) << 6 for of in (s, m)]
    low = (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4
    return [*units, *high, low, (numbers[:, ::2] | numbers[:, 1::2] << 4).flatten(1)]


_PACK = {"Q8_0": _q8_0, "Q5_0": _q5_0, "Q4_K": _q4_k}  # each block's parts, of blocks in float32, in their order


def _ratio(number: "torch.Tensor", unit: "torch.Tensor") -> "torch.Tensor":
    """0 where the unit is."""
    import torch

    return torch.where(unit == 0, 0, number / unit)
