"""Where weights wait, and how the GPU's memory is cut."""

import os
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_vram.errors import Inapplicable
from pytest_vram.pipelines.optimizations.base import OFFLOAD_FOLDER, Optimization, Seen, taken

if TYPE_CHECKING:
    import torch

    from pytest_vram.pipelines.offload import Recorder


class ModelOffload(Optimization):
    name = "model_offload"
    call = "pipe.enable_model_cpu_offload()"
    exact = True
    summary = "one network at a time on the GPU, the others in host memory"
    one_of = "offloads"
    offloads = True
    needs_gpu = True

    def apply(self, pipe: Any, denoiser: str) -> None:
        pipe.enable_model_cpu_offload()

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        from pytest_vram.pipelines.build import networks

        away: list[bool] = []
        others = [network for name, network in networks(pipe).items() if name != denoiser]

        def note(*_: Any) -> None:  # not all of them: some pipelines keep a network of theirs on the GPU
            weights = (weight for network in others for weight in network.parameters())
            away.append(not others or any(weight.device.type == "cpu" for weight in weights))

        getattr(pipe, denoiser).register_forward_hook(note)
        return lambda: bool(away) and all(away)

    def simulate(self, pipe: Any, denoiser: str, recorder: "Recorder") -> Seen:
        from pytest_vram.pipelines.offload import one_network_at_a_time

        return one_network_at_a_time(pipe, recorder)


class SequentialOffload(Optimization):
    name = "sequential_offload"
    call = "pipe.enable_sequential_cpu_offload()"
    exact = True
    summary = "one layer at a time on the GPU, everything else in host memory: the least VRAM, the most time"
    one_of = "offloads"
    offloads = True
    needs_gpu = True

    def apply(self, pipe: Any, denoiser: str) -> None:
        pipe.enable_sequential_cpu_offload()

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        away: list[bool] = []

        def note(module: "torch.nn.Module", *_: Any) -> None:
            away.append(next(module.parameters()).is_meta)

        getattr(pipe, denoiser).register_forward_hook(note)
        return lambda: bool(away) and all(away)

    def simulate(self, pipe: Any, denoiser: str, recorder: "Recorder") -> Seen:
        from pytest_vram.pipelines.build import networks
        from pytest_vram.pipelines.offload import one_layer_at_a_time

        return one_layer_at_a_time(networks(pipe), recorder)


class _GroupOffload(Optimization):
    """diffusers' group offload. What it cannot take, such as most VAEs by blocks, stays on the GPU."""

    exact = True
    one_of = "offloads"
    offloads = True
    needs_gpu = True
    leaf: ClassVar[bool]
    stream: ClassVar[bool] = False
    onto: ClassVar[str] = "cuda"

    def _left_out(self, pipe: Any, denoiser: str) -> list[str]:
        import torch

        from pytest_vram.pipelines.build import networks
        from pytest_vram.pipelines.offload import ungroupable

        vae: Any = getattr(pipe, "vae", None)
        kept = "files" if self.on_disk else "pinned copies" if self.stream else None
        if kept and hasattr(pipe, "upcast_vae") and vae.dtype == torch.float16 and vae.config.force_upcast:
            raise Inapplicable(f"{self.name}: its {kept} undo the cast of the VAE to float32")
        reasons = {name: ungroupable(network, leaf=self.leaf) for name, network in networks(pipe).items()}
        if reason := reasons.get(denoiser):
            raise Inapplicable(f"{self.name}: {reason}")
        return [name for name, reason in reasons.items() if reason]

    def _options(self) -> dict[str, Any]:
        import torch

        return {
            "onload_device": torch.device(self.onto),
            "offload_type": "leaf_level" if self.leaf else "block_level",
            "num_blocks_per_group": None if self.leaf else 1,
            "use_stream": self.stream,
        }

    def apply(self, pipe: Any, denoiser: str) -> None:
        offload = taken(pipe, "enable_group_offload")
        offload(**self._options(), exclude_modules=self._left_out(pipe, denoiser))

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        away: list[bool] = []

        def note(module: "torch.nn.Module", *_: Any) -> None:
            away.append(any(parameter.device.type == "cpu" for parameter in module.parameters()))

        getattr(pipe, denoiser).register_forward_hook(note)
        return lambda: bool(away) and all(away)

    def simulate(self, pipe: Any, denoiser: str, recorder: "Recorder") -> Seen:
        from pytest_vram.pipelines.build import networks
        from pytest_vram.pipelines.offload import groups_at_a_time

        left_out = self._left_out(pipe, denoiser)
        how = {"leaf": self.leaf, "stream": self.stream, "disk": self.on_disk}
        return groups_at_a_time(networks(pipe), recorder, **how, exclude=left_out)


class GroupOffloadBlock(_GroupOffload):
    name = "group_offload_block"
    call = 'pipe.enable_group_offload(device, offload_type="block_level", num_blocks_per_group=1)'
    summary = "one block of a network at a time on the GPU"
    leaf = False


class GroupOffloadLeaf(_GroupOffload):
    name = "group_offload_leaf"
    call = 'pipe.enable_group_offload(device, offload_type="leaf_level")'
    summary = "one layer at a time on the GPU"
    leaf = True


class GroupOffloadBlockStream(_GroupOffload):
    name = "group_offload_block_stream"
    call = 'pipe.enable_group_offload(device, offload_type="block_level", num_blocks_per_group=1, use_stream=True)'
    summary = "one block of a network at a time on the GPU, the next one copied meanwhile; host memory is pinned"
    leaf = False
    stream = True


class GroupOffloadLeafStream(_GroupOffload):
    name = "group_offload_leaf_stream"
    call = 'pipe.enable_group_offload(device, offload_type="leaf_level", use_stream=True)'
    summary = "one layer at a time on the GPU, the next one copied meanwhile; host memory is pinned"
    leaf = True
    stream = True


class _GroupOffloadDisk(_GroupOffload):
    """Weights are read from files for each forward; those of text encoders that cannot be written wait in host memory.
    While a pipeline is loaded host memory holds it all, as it does for users: what is saved is what it holds later."""

    on_disk = True
    excludes = frozenset({"channels_last"})  # safetensors refuses strides of their own

    def apply(self, pipe: Any, denoiser: str) -> None:
        from diffusers.hooks import apply_group_offloading

        from pytest_vram.pipelines.build import networks, weights_bytes
        from pytest_vram.pipelines.offload import unwritable

        folder, left_out = Path(os.environ[OFFLOAD_FOLDER]), self._left_out(pipe, denoiser)
        grouped = {name: network for name, network in networks(pipe).items() if name not in left_out}
        written = {name: network for name, network in grouped.items() if not unwritable(network)}
        needed, free = weights_bytes(written), shutil.disk_usage(folder).free
        if needed > free:
            has = f"the temporary folder (TMPDIR) has {free / 2**30:.1f} GiB free"
            raise Inapplicable(f"{self.name}: {needed / 2**30:.1f} GiB of weights, and {has}")
        for name in left_out:
            getattr(pipe, name).to(self.onto)
        for name, network in grouped.items():  # a folder each: diffusers names the files by the paths of layers alone
            offload = getattr(network, "enable_group_offload", partial(apply_group_offloading, network))
            offload(**self._options(), offload_to_disk_path=str(folder / name) if name in written else None)

    def _left_out(self, pipe: Any, denoiser: str) -> list[str]:
        from pytest_vram.pipelines.offload import unwritable

        if reason := unwritable(getattr(pipe, denoiser)):
            raise Inapplicable(f"{self.name}: {reason}")
        return super()._left_out(pipe, denoiser)

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        seen, files = super().watch(pipe, denoiser), Path(os.environ[OFFLOAD_FOLDER], denoiser)
        return lambda: seen() and any(files.glob("*.safetensors"))


class GroupOffloadBlockDisk(_GroupOffloadDisk):
    name = "group_offload_block_disk"
    call = (
        'pipe.enable_group_offload(device, offload_type="block_level", num_blocks_per_group=1, '
        "offload_to_disk_path=folder)"
    )
    summary = "one block of a network at a time on the GPU, read from a file each time; host memory holds none"
    leaf = False


class GroupOffloadLeafDisk(_GroupOffloadDisk):
    name = "group_offload_leaf_disk"
    call = 'pipe.enable_group_offload(device, offload_type="leaf_level", offload_to_disk_path=folder)'
    summary = "one layer at a time on the GPU, read from a file each time; host memory holds none"
    leaf = True


class ExpandableSegments(Optimization):
    name = "expandable_segments"
    call = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
    exact = True
    summary = "PyTorch's allocator grows its segments in place, so that less is lost to fragmentation"
    environ = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    needs_gpu = True

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        import torch

        return lambda: any(segment.get("is_expandable") for segment in torch.cuda.memory_snapshot())

    def simulate(self, pipe: Any, denoiser: str, recorder: "Recorder") -> Seen:
        return lambda: True  # it is the model of the allocator that changes, not the pipeline
