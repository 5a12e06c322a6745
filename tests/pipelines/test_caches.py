"""Caches of the denoiser's outputs: whether they left anything out."""

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from diffusers import ChromaTransformer2DModel, FluxTransformer2DModel, UNet2DConditionModel
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

from pytest_vram.errors import Inapplicable
from pytest_vram.pipelines.optimizations import OPTIMIZATIONS, caches, chosen

STEPS = 12
SIZES = {"attention_head_dim": 16, "num_attention_heads": 2, "in_channels": 4, "joint_attention_dim": 8}
CACHES = [name for name, flag in OPTIMIZATIONS.items() if flag.one_of == "caches"]


class FirstBlock(caches.CacheFirstBlock):
    def __init__(self, threshold: float) -> None:
        self.options = {"threshold": threshold}  # type: ignore[misc]


class TaylorSeerLater(caches.CacheTaylorSeer):
    options: ClassVar[dict[str, Any]] = {"disable_cache_before_step": STEPS}


class PyramidNever(caches.CachePyramidAttention):
    options: ClassVar[dict[str, Any]] = {
        "spatial_attention_block_skip_range": 2,
        "spatial_attention_timestep_skip_range": (2000, 3000),
    }


def flux() -> Any:
    torch.manual_seed(0)
    layers = {"num_layers": 2, "num_single_layers": 2, "pooled_projection_dim": 8, "axes_dims_rope": (4, 4, 8)}
    network = FluxTransformer2DModel(**SIZES, **layers, guidance_embeds=True).eval()
    return SimpleNamespace(transformer=network, num_timesteps=STEPS)


@torch.no_grad()
def denoise(pipe: Any, steps: int = STEPS) -> torch.Tensor:
    """What a pipeline does with its denoiser."""
    network = pipe.transformer
    torch.manual_seed(0)
    sample = torch.randn(1, 4, 4)
    given = {"encoder_hidden_states": torch.randn(1, 3, 8), "pooled_projections": torch.randn(1, 8)}
    given |= {"img_ids": torch.zeros(4, 3), "txt_ids": torch.zeros(3, 3), "guidance": torch.ones(1)}
    for step in range(steps):
        pipe.current_timestep = 1000 * (1 - step / steps)
        with network.cache_context("cond"):
            out = network(sample, timestep=torch.full((1,), 1 - step / steps), **given).sample
        sample = sample - out / steps
    return sample


@pytest.mark.parametrize(
    ("cache", "applied"),
    [
        (FirstBlock(10.0), True),
        (FirstBlock(0.0), False),
        (OPTIMIZATIONS["cache_taylorseer"], True),
        (TaylorSeerLater(), False),
        (OPTIMIZATIONS["cache_pyramid_attention"], True),
        (PyramidNever(), False),
        (OPTIMIZATIONS["cache_faster"], True),
        (OPTIMIZATIONS["cache_mag"], True),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_cache_is_seen_where_it_left_something_out(cache: Any, applied: bool) -> None:
    plain = denoise(flux())
    pipe = flux()
    cache.apply(pipe, "transformer")
    seen = cache.watch(pipe, "transformer")
    assert not seen()
    assert torch.equal(denoise(pipe), plain) is not applied, "what is left out is seen in the output"
    assert seen() is applied


@pytest.mark.parametrize("name", CACHES)
def test_too_few_steps_leave_nothing_out(name: str) -> None:
    (cache,) = chosen([name])
    pipe = flux()
    cache.apply(pipe, "transformer")
    seen = cache.watch(pipe, "transformer")
    denoise(pipe, 1)
    assert not seen()


@pytest.mark.parametrize("name", CACHES)
def test_without_the_flag_nothing_is_left_out(name: str) -> None:
    pipe = flux()
    seen = chosen([name])[0].watch(pipe, "transformer")
    denoise(pipe)
    assert not seen()


def test_of_two_denoisers_either_may_leave_something_out() -> None:
    cache, pipe = FirstBlock(10.0), flux()
    pipe.transformer_2 = flux().transformer
    cache.apply(pipe, "transformer")
    seen = cache.watch(pipe, "transformer")
    denoise(pipe, 1)
    assert not seen()
    denoise(SimpleNamespace(transformer=pipe.transformer_2))
    assert seen()


def test_hooks_that_always_compute_are_no_cache() -> None:
    pipe = flux()
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    seen = FirstBlock(10.0).watch(pipe, "transformer")
    denoise(pipe)
    assert not seen()


@pytest.mark.parametrize("steps", [4, STEPS, 28, 50])
def test_the_ratios_of_magcache_are_for_as_many_steps_as_are_taken(steps: int) -> None:
    cache, pipe = OPTIMIZATIONS["cache_mag"], flux()
    pipe.num_timesteps = steps
    cache.apply(pipe, "transformer")
    denoise(pipe, steps)
    config = pipe.transformer._cache_config
    assert config.num_inference_steps == len(config.mag_ratios) == steps
    assert {*config.mag_ratios.tolist()} <= {*FLUX_MAG_RATIOS.tolist()}
    assert (config.mag_ratios[0], config.mag_ratios[-1]) == (FLUX_MAG_RATIOS[0], FLUX_MAG_RATIOS[-1])


def test_magcache_takes_a_model_with_known_ratios() -> None:
    layers = {"num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (4, 4, 8), "approximator_num_channels": 8}
    chroma = ChromaTransformer2DModel(**SIZES, **layers, approximator_hidden_dim=8, approximator_layers=1)
    with pytest.raises(Inapplicable, match=r"^cache_mag: diffusers has no ratios for ChromaTransformer2DModel$"):
        OPTIMIZATIONS["cache_mag"].apply(SimpleNamespace(transformer=chroma), "transformer")
    assert not chroma.is_cache_enabled


def test_a_network_that_takes_no_cache() -> None:
    unet = UNet2DConditionModel(block_out_channels=(32, 32, 32, 32), cross_attention_dim=8, attention_head_dim=8)
    with pytest.raises(Inapplicable, match=r"^UNet2DConditionModel has no enable_cache$"):
        OPTIMIZATIONS["cache_taylorseer"].apply(SimpleNamespace(unet=unet), "unet")
