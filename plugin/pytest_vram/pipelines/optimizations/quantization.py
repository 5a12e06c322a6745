"""The denoiser's weights in fewer bits."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_vram.errors import Inapplicable
from pytest_vram.pipelines.optimizations.base import Optimization, Seen, denoisers

if TYPE_CHECKING:
    import torch


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
