"""An application with seven pipelines, and a switch for each regression; bench/regressions/inject.py turns them on."""

import os
from typing import Any

import torch

from pytest_vram.cases.models import read_models
from pytest_vram.pipelines.build import random_pipeline

DEVICE = "cuda"
STEPS = 2
HELD_MIB = 0  # while the denoiser runs
UPCASTS = False  # the VAE decodes in float32
LEAKED_MIB = 0  # host memory, a call
DECODES = 20  # of the pipeline whose time is judged; no denoiser, so that the GPU and not the host decides it
TOO_LARGE = False

held: list[torch.Tensor] = []
leaked: list[bytearray] = []


def build() -> Any:
    """Stable Diffusion 1.5."""
    return random_pipeline(read_models()["stable-diffusion-v1-5"], torch.float16, DEVICE)


def build_held() -> Any:
    """The same, with something held while the denoiser runs."""
    pipe = build()
    if HELD_MIB:
        pipe.unet.register_forward_pre_hook(
            lambda *_: held.append(torch.empty(HELD_MIB << 20, dtype=torch.uint8, device=DEVICE))
        )
        pipe.unet.register_forward_hook(lambda *_: held.clear())
    return pipe


def build_upcast() -> Any:
    """The same, with a VAE that may be upcast."""
    pipe = build()
    if UPCASTS:
        decode = pipe.vae.to(torch.float32).decode
        pipe.vae.decode = lambda latents, **kwargs: decode(latents.float(), **kwargs)
    return pipe


def build_vae() -> Any:
    """The VAE alone."""
    return build().vae


def generate(pipe: Any, batch_size: int) -> Any:
    generator = torch.Generator(DEVICE).manual_seed(0)
    prompts = ["a red bridge"] * batch_size
    return pipe(prompts, num_inference_steps=STEPS, generator=generator, output_type="pt")


def one(pipe: Any) -> Any:
    return generate(pipe, 1)


def four(pipe: Any) -> Any:
    return generate(pipe, 4)


def maybe_too_large(pipe: Any) -> Any:
    if TOO_LARGE:
        torch.empty(1 << 40, dtype=torch.uint8, device=DEVICE)
    return one(pipe)


def maybe_leaking(pipe: Any) -> Any:
    if LEAKED_MIB:
        leaked.append(bytearray(os.urandom(1 << 20) * LEAKED_MIB))
    return one(pipe)


@torch.no_grad()
def decode(vae: Any) -> Any:
    latents = torch.zeros(2, 4, 64, 64, dtype=torch.float16, device=DEVICE)
    for _ in range(DECODES):
        image = vae.decode(latents).sample
    return image
