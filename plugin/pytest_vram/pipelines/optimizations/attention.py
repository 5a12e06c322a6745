"""Which kernel computes the denoiser's attention."""

from importlib.util import find_spec
from typing import Any, ClassVar

from pytest_vram.errors import Inapplicable
from pytest_vram.pipelines.optimizations.base import Optimization, Seen, denoisers, taken


class AttentionSlicing(Optimization):
    name = "attention_slicing"
    call = "pipe.enable_attention_slicing()"
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
    needs_gpu = True
    one_of = "attention backends"

    def apply(self, pipe: Any, denoiser: str) -> None:
        for network in denoisers(pipe, denoiser):
            try:
                taken(network, "set_attention_backend")(self.backend)
            except (RuntimeError, ImportError) as error:  # what it needs is not here, or too old
                missing = self.package and find_spec(self.package.replace("-", "_")) is None
                why = f"it needs a package: pip install {self.package}" if missing else " ".join(str(error).split())
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
    call = 'pipe.transformer.set_attention_backend("_native_math")'
    backend = "_native_math"
    summary = "PyTorch's attention without a fused kernel: what a fused one saves"


class AttentionNativeEfficient(_Attention):
    name = "attention_native_efficient"
    call = 'pipe.transformer.set_attention_backend("_native_efficient")'
    backend = "_native_efficient"
    summary = "PyTorch's memory-efficient kernel"


class AttentionNativeFlash(_Attention):
    name = "attention_native_flash"
    call = 'pipe.transformer.set_attention_backend("_native_flash")'
    backend = "_native_flash"
    summary = "PyTorch's FlashAttention kernel"


class AttentionNativeCudnn(_Attention):
    name = "attention_native_cudnn"
    call = 'pipe.transformer.set_attention_backend("_native_cudnn")'
    backend = "_native_cudnn"
    summary = "cuDNN's fused kernel"


class AttentionFlash(_Attention):
    name = "attention_flash"
    call = 'pipe.transformer.set_attention_backend("flash")'
    backend = "flash"
    package = "flash-attn"
    summary = "FlashAttention 2 of the package flash-attn"


class AttentionSage(_Attention):
    name = "attention_sage"
    call = 'pipe.transformer.set_attention_backend("sage")'
    backend = "sage"
    package = "sageattention"
    summary = "SageAttention, in 8 bits"


class AttentionXformers(_Attention):
    name = "attention_xformers"
    call = 'pipe.transformer.set_attention_backend("xformers")'
    backend = "xformers"
    package = "xformers"
    summary = "xFormers' memory-efficient kernel"
