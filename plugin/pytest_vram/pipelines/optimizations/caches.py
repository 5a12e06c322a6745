"""Outputs of the denoiser's parts, used again in later steps."""

from collections.abc import Mapping
from typing import Any, ClassVar

from pytest_vram.pipelines.optimizations.base import Optimization, Seen, denoisers, taken


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
