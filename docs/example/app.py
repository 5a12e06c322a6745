"""A small application with a diffusion pipeline of its own: latent diffusion with a loop that is in no library."""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Painter:
    """Turns noise into pictures."""

    unet: UNet2DModel
    vae: AutoencoderKL
    scheduler: DDIMScheduler

    @torch.no_grad()
    def paint(self, count: int, steps: int) -> torch.Tensor:
        """`count` pictures of 128x128 pixels: (count, 3, 128, 128)."""
        latents = torch.randn(count, 4, 32, 32, device=DEVICE)
        self.scheduler.set_timesteps(steps)
        for timestep in self.scheduler.timesteps:
            noise = self.unet(latents, timestep).sample
            latents = self.scheduler.step(noise, timestep, latents).prev_sample
        return self.vae.decode(latents).sample


def build_painter() -> Painter:
    """The painter, on the GPU where there is one."""
    blocks = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
    unet = UNet2DModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        down_block_types=blocks[0],
        up_block_types=blocks[1],
        block_out_channels=(64, 128),
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
    )
    return Painter(unet.to(DEVICE).eval(), vae.to(DEVICE).eval(), DDIMScheduler())


def paint_two(painter: Painter) -> torch.Tensor:
    """One call, as a request to the application makes it."""
    return painter.paint(count=2, steps=4)
