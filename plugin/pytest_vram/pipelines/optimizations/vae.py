"""The VAE in parts, or another one."""

from typing import TYPE_CHECKING, Any

from pytest_vram.errors import Inapplicable
from pytest_vram.pipelines.optimizations.base import Optimization, Seen, batches_of, taken

if TYPE_CHECKING:
    import torch

TINY_VAES = {  # latent channels and scaling factor of the VAE that each replaces
    (4, 0.18215): "madebyollin/taesd",
    (4, 0.13025): "madebyollin/taesdxl",
    (16, 1.5305): "madebyollin/taesd3",
    (16, 0.3611): "madebyollin/taef1",
}


class VaeSlicing(Optimization):
    name = "vae_slicing"
    call = "pipe.vae.enable_slicing()"
    exact = True
    summary = "the VAE decodes one image of the batch at a time"

    def apply(self, pipe: Any, denoiser: str) -> None:
        taken(taken(pipe, "vae"), "enable_slicing")()

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        batches = batches_of(pipe.vae, "decode")
        parts = (pipe.vae, "_decode") if hasattr(pipe.vae, "_decode") else (pipe.vae.decoder, "forward")
        slices = batches_of(*parts)
        return lambda: bool(slices) and max(slices) < max(batches)


class VaeTiling(Optimization):
    name = "vae_tiling"
    call = "pipe.vae.enable_tiling()"
    exact = True
    summary = "the VAE decodes overlapping tiles; nothing happens below its tile size"

    def apply(self, pipe: Any, denoiser: str) -> None:
        taken(taken(pipe, "vae"), "enable_tiling")()

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        tiled = batches_of(pipe.vae, "tiled_decode" if hasattr(pipe.vae, "tiled_decode") else "_tiled_decode")
        return lambda: bool(tiled)


class TinyVae(Optimization):
    name = "tiny_vae"
    call = 'pipe.vae = AutoencoderTiny.from_pretrained("madebyollin/taesdxl")'
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
        decoded = batches_of(pipe.vae, "decode")
        return lambda: bool(decoded) and type(pipe.vae).__name__ == "AutoencoderTiny"
