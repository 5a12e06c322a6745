"""Outputs of the denoiser's parts, used again in later steps."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from pytest_vram.errors import Inapplicable
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
        """Whether a part of the denoiser was called and not computed: a hook of diffusers stands before the forward of
        a part, which it calls or not."""
        counts = [_Counts(network) for network in denoisers(pipe, denoiser)]
        return lambda: any(count.computed < count.called for count in counts)


class _Counts:
    """How often the parts of a network that have hooks are called, and how often they are computed."""

    def __init__(self, network: Any) -> None:
        self.called = self.computed = 0
        for part in network.modules():
            registry = getattr(part, "_diffusers_hook", None)
            replaced = [ref for ref in registry._fn_refs if ref.original_forward] if registry else []
            if part is network or not replaced:
                continue
            part.register_forward_pre_hook(self._call)
            replaced[0].original_forward = self._counted(replaced[0].original_forward)  # that of the part itself

    def _call(self, *_: Any) -> None:
        self.called += 1

    def _counted(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def computing(*args: Any, **kwargs: Any) -> Any:
            self.computed += 1
            return forward(*args, **kwargs)

        return computing


class CacheFirstBlock(_Cache):
    name = "cache_first_block"
    call = "pipe.transformer.enable_cache(FirstBlockCacheConfig())"
    summary = "FirstBlockCache: the rest is left out where the first block's output hardly changed"
    config = "FirstBlockCacheConfig"


class CachePyramidAttention(_Cache):
    name = "cache_pyramid_attention"
    call = "pipe.transformer.enable_cache(PyramidAttentionBroadcastConfig(...))"
    summary = "Pyramid Attention Broadcast: attention is computed in every other step"
    config = "PyramidAttentionBroadcastConfig"
    options = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (100, 800)}
    by_timestep = True


class CacheFaster(_Cache):
    name = "cache_faster"
    call = "pipe.transformer.enable_cache(FasterCacheConfig(...))"
    summary = "FasterCache: attention and the unconditional branch are computed in some steps"
    config = "FasterCacheConfig"
    by_timestep = True

    def of(self, network: Any) -> Mapping[str, Any]:
        return {"is_guidance_distilled": bool(network.config.get("guidance_embeds"))}


class CacheTaylorSeer(_Cache):
    name = "cache_taylorseer"
    call = "pipe.transformer.enable_cache(TaylorSeerCacheConfig())"
    summary = "TaylorSeer: outputs are predicted from those of earlier steps"
    config = "TaylorSeerCacheConfig"


class CacheMag(_Cache):
    """Its ratios are measured for a model; diffusers has those of FLUX.1."""

    name = "cache_mag"
    call = "pipe.transformer.enable_cache(MagCacheConfig(mag_ratios=..., num_inference_steps=...))"
    summary = "MagCache: steps are left out in which the output's magnitude is known to change little"
    config = "MagCacheConfig"

    def of(self, network: Any) -> Mapping[str, Any]:
        if type(network).__name__ != "FluxTransformer2DModel":
            raise Inapplicable(f"{self.name}: diffusers has no ratios for {type(network).__name__}")
        from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

        return {"mag_ratios": FLUX_MAG_RATIOS}

    def apply(self, pipe: Any, denoiser: str) -> None:
        super().apply(pipe, denoiser)
        for network in denoisers(pipe, denoiser):
            network.register_forward_pre_hook(lambda network, _: self._fit(network._cache_config, pipe.num_timesteps))

    def _fit(self, config: Any, steps: int) -> None:
        """The ratios for as many steps as this call takes, which nobody knows before it."""
        from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS, nearest_interp

        if steps != config.num_inference_steps:
            config.num_inference_steps, config.mag_ratios = steps, nearest_interp(FLUX_MAG_RATIOS, steps)
