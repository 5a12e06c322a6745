"""Dtypes, and how the denoiser's products are computed."""

from typing import TYPE_CHECKING, Any

from pytest_vram.errors import Inapplicable
from pytest_vram.pipelines.optimizations.base import Optimization, Seen, denoisers, taken

if TYPE_CHECKING:
    import torch

    from pytest_vram.pipelines.offload import Recorder


class _Dtype(Optimization):
    def watch(self, pipe: Any, denoiser: str) -> Seen:
        import torch

        network = getattr(pipe, denoiser)
        wanted = getattr(torch, self.dtype or "")
        return lambda: network.dtype == wanted


class Fp32(_Dtype):
    name = "fp32"
    call = "DiffusionPipeline.from_pretrained(model, dtype=torch.float32)"
    summary = "weights and arithmetic in float32"
    dtype = "float32"


class Fp16(_Dtype):
    name = "fp16"
    call = "DiffusionPipeline.from_pretrained(model, dtype=torch.float16)"
    summary = "weights and arithmetic in float16"
    dtype = "float16"


class Bf16(_Dtype):
    name = "bf16"
    call = "DiffusionPipeline.from_pretrained(model, dtype=torch.bfloat16)"
    summary = "weights and arithmetic in bfloat16"
    dtype = "bfloat16"


class ChannelsLast(Optimization):
    name = "channels_last"
    call = "pipe.unet.to(memory_format=torch.channels_last), and the VAE"
    exact = True
    summary = "the convolutions of denoiser and VAE in NHWC memory format"

    def apply(self, pipe: Any, denoiser: str) -> None:
        import torch

        for network in (*denoisers(pipe, denoiser), *denoisers(pipe, "vae")):
            if any(parameter.dim() == 5 for parameter in network.parameters()):
                kind = type(network).__name__
                raise Inapplicable(f"{self.name}: the convolutions of {kind} are in three dimensions, NHWC is for two")
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
    call = "pipe.transformer.fuse_qkv_projections()"
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
    call = "torch.backends.cuda.matmul.allow_tf32 = True"
    summary = "matrix products of float32 in TensorFloat-32, in half precision of what is kept in float32"
    needs_gpu = True

    def apply(self, pipe: Any, denoiser: str) -> None:
        import torch

        if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
            raise Inapplicable(f"{self.name}: this GPU has no TensorFloat-32; compute capability 8.0 and up do")
        torch.backends.cuda.matmul.allow_tf32 = True

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        import torch

        layers = [
            m for network in denoisers(pipe, denoiser) for m in network.modules() if isinstance(m, torch.nn.Linear)
        ]
        return lambda: any(layer.weight.dtype == torch.float32 for layer in layers)

    def simulate(self, pipe: Any, denoiser: str, recorder: "Recorder") -> Seen:
        return self.watch(pipe, denoiser)  # products take no other memory
