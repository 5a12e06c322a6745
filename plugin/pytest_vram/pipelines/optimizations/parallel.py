"""One case on several GPUs."""

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar
from unittest.mock import patch

from pytest_vram.errors import Inapplicable
from pytest_vram.pipelines.optimizations.base import Optimization, Seen, denoisers, taken

if TYPE_CHECKING:
    import torch

    from pytest_vram.pipelines.offload import Recorder


class _SeveralGpus(Optimization):
    gpus = 2
    needs_gpu = True
    one_of = "ways to use several GPUs"
    excludes = frozenset({"offloads", "places of the text encoders"})


class DeviceMapBalanced(_SeveralGpus):
    name = "device_map_balanced"
    call = 'DiffusionPipeline.from_pretrained(model, device_map="balanced")'
    summary = "the networks are spread over two GPUs, each on one of them"
    excludes = _SeveralGpus.excludes | {"precisions of the weights"}  # it goes by the weights' bytes
    exact = True

    def apply(self, pipe: Any, denoiser: str) -> None:
        import torch
        from accelerate import dispatch_model

        from pytest_vram.pipelines.build import networks

        parts = networks(pipe)
        places = self.gpu_of(parts)
        for name, network in parts.items():
            skip = getattr(network, "_skip_keys", None)
            dispatch_model(network, {"": torch.device("cuda", places[name])}, force_hooks=True, skip_keys=skip)
        pipe.hf_device_map = places

    def gpu_of(self, networks: "Mapping[str, torch.nn.Module]") -> dict[str, int]:
        """As diffusers' `device_map="balanced"` has it where the GPUs have the same room."""
        from diffusers.pipelines import pipeline_loading_utils

        from pytest_vram.pipelines.build import weights_bytes

        sizes = {name: float(weights_bytes({name: network})) for name, network in networks.items()}
        largest_first = dict(sorted(sizes.items(), key=lambda item: item[1], reverse=True))
        room = {str(gpu): float("inf") for gpu in range(self.gpus)}
        found = taken(pipeline_loading_utils, "_assign_components_to_devices")(largest_first, room, "balanced")
        return {name: int(gpu) for gpu, names in found.items() for name in names}

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        from pytest_vram.pipelines.build import networks

        ran: set[torch.device] = set()

        def note(network: "torch.nn.Module", *_: Any) -> None:
            ran.add(next(network.parameters()).device)

        for network in networks(pipe).values():
            decoder: Any = getattr(network, "decoder", None)  # of a VAE the one that runs
            (decoder if hasattr(network, "decode") and decoder is not None else network).register_forward_hook(note)
        return lambda: len(ran) == self.gpus

    def simulate(self, pipe: Any, denoiser: str, recorder: "Recorder") -> Seen:
        """On the GPU that the recorder stands for: what runs on the other one takes nothing here but its outputs."""
        from pytest_vram.pipelines.build import modules_in_order, networks
        from pytest_vram.pipelines.offload import Unit

        parts = networks(pipe)
        places = self.gpu_of(parts)
        here = {name: network for name, network in parts.items() if places[name] == recorder.gpu}
        there = {name: network for name, network in parts.items() if name not in here}
        Unit(list(modules_in_order(there)), recorder)
        for network in there.values():
            for method in ("forward", "decode"):
                if original := getattr(network, method, None):
                    setattr(network, method, _elsewhere(original, recorder))
        return lambda: bool(here and there)


def _elsewhere(function: Any, recorder: "Recorder") -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        with recorder.host():
            return function(*args, **kwargs)

    return run


class _ContextParallel(_SeveralGpus):
    """A process for each GPU with all of the pipeline; of the denoiser's tokens each has a part."""

    processes = True
    excludes = _SeveralGpus.excludes | {"caches"}  # each process would decide by its own tokens, and wait for the other
    degree: ClassVar[str]
    backend: ClassVar[str] = ""  # that it needs; PyTorch's own choice cannot pass parts of a softmax on

    def apply(self, pipe: Any, denoiser: str) -> None:
        import torch.distributed

        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl")
        self._enable(pipe, denoiser)

    def _enable(self, pipe: Any, denoiser: str, **more: Any) -> None:
        import diffusers

        for network in denoisers(pipe, denoiser):
            if getattr(network, "_cp_plan", None) is None:
                raise Inapplicable(f"{self.name}: diffusers has no plan for {type(network).__name__}")
            config = taken(diffusers, "ContextParallelConfig")(**{self.degree: self.gpus}, **more)
            try:
                if self.backend:
                    network.set_attention_backend(self.backend)
                taken(network, "enable_parallelism")(config=config)
            except ValueError as error:  # as where the backend cannot be split
                raise Inapplicable(f"{self.name}: {' '.join(str(error).split())}") from None

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        """That the denoiser ran as one of as many processes."""
        seen: list[bool] = []

        def note(network: "torch.nn.Module", *_: Any) -> None:
            config = getattr(network, "_parallel_config", None)
            seen.append(config is not None and config._world_size == self.gpus)

        for network in denoisers(pipe, denoiser):
            network.register_forward_hook(note)
        return lambda: bool(seen) and all(seen)

    def simulate(self, pipe: Any, denoiser: str, recorder: "Recorder") -> Seen:
        """As the first of the processes; what they tell each other is allocated, and not sent."""
        import torch.distributed
        from torch.distributed.device_mesh import init_device_mesh
        from torch.testing._internal.distributed.fake_pg import FakeStore

        with contextlib.suppress(ValueError):  # there is one already
            torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=self.gpus)
        shape = (self.gpus, 1) if self.degree == "ring_degree" else (1, self.gpus)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("ring", "ulysses"))
        with patch.object(torch.accelerator, "device_count", lambda: self.gpus):
            self._enable(pipe, denoiser, mesh=mesh)
        return self.watch(pipe, denoiser)


class ContextParallelUlysses(_ContextParallel):
    name = "context_parallel_ulysses"
    call = "pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))"
    summary = "two GPUs with half of the denoiser's tokens each; for attention with half of the heads each"
    degree = "ulysses_degree"


class ContextParallelRing(_ContextParallel):
    name = "context_parallel_ring"
    call = "pipe.transformer.enable_parallelism(config=ContextParallelConfig(ring_degree=2))"
    summary = "two GPUs with half of the denoiser's tokens each; for attention keys and values go round"
    degree = "ring_degree"
    backend = "_native_flash"
    excludes = _ContextParallel.excludes | {"attention backends"}
