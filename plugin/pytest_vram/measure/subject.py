"""What a worker measures: a case of a sweep, or a pipeline that somebody's own functions build and call."""

import os
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch

from pytest_vram.cases.case import Case
from pytest_vram.cases.models import Model
from pytest_vram.measure.channel import Message
from pytest_vram.measure.phases import Enter, Phases, Queued, WholeCall
from pytest_vram.pipelines.build import (
    Arrived,
    Components,
    call_arguments,
    denoiser_calls,
    networks,
    pretrained_pipeline,
    random_pipeline,
    weights_bytes,
)
from pytest_vram.pipelines.optimizations import chosen, gpus_of, torch_dtype
from pytest_vram.pipelines.optimizations.base import Seen


class Subject(Protocol):
    """Builds a pipeline on `place` ("cuda" or "cpu") and calls it."""

    @property
    def native_steps(self) -> int | None:
        """The model's own number of steps, where that is known."""

    def build(self, place: str) -> Any:
        """The pipeline in place, its optimizations applied."""

    def weights(self, pipe: Any) -> int | None:
        """Bytes of its parameters and buffers."""

    def watch(self, pipe: Any) -> dict[str, Seen]:
        """By optimization, what says after the calls whether it took effect."""

    def phases(self, pipe: Any, enter: Enter, queued: Queued) -> Phases | WholeCall:
        """What tells `enter` where a call passes from phase to phase, and `queued` when the denoiser returns."""

    def call(self, pipe: Any, place: str, steps: int | None = None) -> Any:
        """One call, of as many steps where the subject lets them be chosen."""

    def calls_at_native_length(self, pipe: Any, calls: int) -> int | None:
        """How often the denoiser runs at the model's native number of steps, where that is known; `calls` is how often
        it did in a call."""

    def images(self, output: Any) -> int | None:
        """How many images a call has made, where that is known."""


def subject_of(job: Message) -> Subject:
    """The subject that a job describes."""
    subject: Subject = OwnSubject(job["own"]) if "own" in job else SweepSubject(job)
    return subject


class SweepSubject:
    """A case of a sweep. With `probe` in the job its weights are random and, in host memory, share their storage."""

    def __init__(self, job: Message) -> None:
        self.case = Case.model_validate(job["case"])
        self.model = Model.model_validate(job["model"])
        self.probe = bool(job.get("probe"))
        self.on_host = bool(job.get("on_host"))  # weights as an offloaded case has them
        self.optimizations = chosen(self.case.optimizations)
        self.native_steps = self.model.native.steps

    def build(self, place: str) -> Any:
        dtype = torch_dtype(self.case.optimizations)
        offloads = [optimization for optimization in self.optimizations if optimization.offloads]
        start = "cpu" if offloads else place
        torch.manual_seed(self.case.seed)
        if self.case.weights == "pretrained" and not self.probe:
            pipe = pretrained_pipeline(self.model, dtype, start, self._prepare, self._places)
        elif self.on_host:
            pipe = random_pipeline(self.model, dtype, "cpu", prepare=self._prepare).to(place)
        else:
            share = self.probe and not any(offload.on_disk for offload in offloads)
            pipe = random_pipeline(self.model, dtype, start, share=share, prepare=self._prepare, places=self._places)
        parts = networks(pipe)
        self._weights = weights_bytes(parts)  # before an offload hides them
        for offload in offloads:
            for name in sorted(offload.at_once(parts)):
                parts[name].to(place)
        for optimization in self.optimizations:
            optimization.apply(pipe, self.model.denoiser)
        return pipe

    def _prepare(self, parts: Components) -> list[Arrived]:
        changes = [optimization.prepare(parts, self.model.denoiser) for optimization in self.optimizations]
        return [change for change in changes if change]

    def _places(self, parts: Components) -> dict[str, str]:
        found = [optimization.gpu_of(parts) for optimization in self.optimizations]
        return {name: f"cuda:{gpu}" for places in found for name, gpu in places.items()}

    def weights(self, pipe: Any) -> int | None:
        return self._weights

    def watch(self, pipe: Any) -> dict[str, Seen]:
        return {o.name: o.watch(pipe, self.model.denoiser) for o in self.optimizations}

    def phases(self, pipe: Any, enter: Enter, queued: Queued) -> Phases | WholeCall:
        return Phases(pipe, self.model.denoiser, enter, queued, self.model.decoder)

    def call(self, pipe: Any, place: str, steps: int | None = None) -> Any:
        case = self.case if steps is None else self.case.model_copy(update={"steps": steps})
        if gpus_of(case.optimizations) > 1:
            place = pipe._execution_device
        generator = torch.Generator(place).manual_seed(case.seed)
        return pipe(**call_arguments(pipe, case, generator))

    def calls_at_native_length(self, pipe: Any, calls: int) -> int | None:
        if any(optimization.trained for optimization in self.optimizations):
            return None  # a cache leaves more out the more steps there are
        native, now = (denoiser_calls(pipe, steps) for steps in (self.native_steps, self.case.steps))
        return native and now and native * max(1, round(calls / now))  # twice, where guidance is a call of its own

    def images(self, output: Any) -> int | None:
        return self.case.batch_size


class OwnSubject:
    """Two functions of somebody's own: the job has their file, module and qualified name, and a `sys.path`."""

    def __init__(self, own: Mapping[str, Any]) -> None:
        self.own = own
        self.native_steps = None

    def build(self, place: str) -> Any:
        sys.path[:] = self.own["sys_path"]
        os.chdir(self.own["folder"])
        build = _function(**self.own["build"])
        self._call = _function(**self.own["call"])
        torch.manual_seed(0)
        return build()

    def weights(self, pipe: Any) -> int | None:
        return weights_bytes(_networks_of(pipe)) or None

    def watch(self, pipe: Any) -> dict[str, Seen]:
        return {}

    def phases(self, pipe: Any, enter: Enter, queued: Queued) -> Phases | WholeCall:
        for denoiser in ("transformer", "unet"):
            has_decoder = callable(getattr(getattr(pipe, "vae", None), "decode", None))
            if has_decoder and isinstance(getattr(pipe, denoiser, None), torch.nn.Module):
                return Phases(pipe, denoiser, enter, queued)
        return WholeCall(enter)

    def call(self, pipe: Any, place: str, steps: int | None = None) -> Any:
        torch.manual_seed(0)
        return self._call(pipe)

    def calls_at_native_length(self, pipe: Any, calls: int) -> int | None:
        return None

    def images(self, output: Any) -> int | None:
        images = getattr(output, "images", None)
        return len(images) or None if isinstance(images, (list, torch.Tensor)) else None


def _networks_of(pipe: Any) -> dict[str, torch.nn.Module]:
    if isinstance(pipe, torch.nn.Module):
        return {"": pipe}
    if isinstance(getattr(pipe, "components", None), Mapping):
        return networks(pipe)
    return {name: part for name, part in getattr(pipe, "__dict__", {}).items() if isinstance(part, torch.nn.Module)}


def _function(file: str, module: str, name: str) -> Callable[..., Any]:
    """The function `name` of the module in `file`, imported by its name where that leads there, else from the file."""
    folder = Path(file).parents[module.count(".")]  # where the module's package would be
    loaded = _by_name(file, module) or _by_name(file, module, folder) or _by_file(file, module)
    found: Any = loaded
    for part in name.split("."):
        found = getattr(found, part)
    function: Callable[..., Any] = found
    return function


def _by_name(file: str, module: str, folder: Path | None = None) -> ModuleType | None:
    before = sys.path[:]
    if folder is not None:
        sys.path.insert(0, str(folder))
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and misses another
        return None
    finally:
        sys.path[:] = before
    return found if getattr(found, "__file__", None) == file else None


def _by_file(file: str, module: str) -> ModuleType:
    spec = spec_from_file_location(module, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python module")
    loaded = sys.modules[module] = module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
