"""Builds a diffusers pipeline from a model's architecture or from its trained weights, and says how to call it."""

import inspect
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.initialization import no_init_weights

from pytest_vram.cases.case import Case
from pytest_vram.cases.models import NOT_MEASURED, Component, Model
from pytest_vram.errors import UsageError, unknown
from pytest_vram.pipelines.tokenizer import StandInTokenizer
from pytest_vram.untrusted import is_there

PROMPT = "a bowl of ramen with a soft-boiled egg, photographed from above"
NEGATIVE_PROMPT = "blurry, low quality"
NOISE_STD = 0.02  # the initializer range of CLIP; small enough that fp16 activations stay finite
NOISE_BLOCK = 1 << 20  # elements of the block that host weights repeat: drawing each would take minutes
HOST_THREADS = 4  # fill host memory: 32 on 32 busy cores waited for one another, 1.5 to 2.2 s a GiB; 4 took 0.2 s
SHARED_STRIDE = 256  # elements between the beginnings of weights that share a storage, so that none looks tied

Components = dict[str, torch.nn.Module]
Arrived = Callable[[torch.nn.Module], None]
"""Changes a module that has its weights."""
Places = Callable[[Components], Mapping[str, str]]
"""The devices of networks that are not where the others are."""
Prepare = Callable[[Components], Sequence[Arrived]]
"""Changes networks that have none yet, or have them in host memory."""


def build_component(component: Component, dtype: torch.dtype) -> torch.nn.Module:
    """One network with its parameters on the meta device, in the dtypes `from_pretrained(dtype=...)` gives them.

    No initial values are computed, which would be lost: `fill` writes others. Buffers keep theirs: position tables and
    the like are made by `__init__` and are in no checkpoint.
    """
    cls = _network_class(component)
    with init_empty_weights(include_buffers=False), no_init_weights():
        if component.library == "diffusers":
            module: Any = cls.from_config(component.config)
        else:
            module = cls(cls.config_class(**component.config))
    if hasattr(module, "tie_weights"):
        module.tie_weights()
    kept = _kept_in_fp32(cls, component.library, dtype)
    made: dict[int, torch.nn.Parameter] = {}  # tied parameters stay tied
    for path, submodule in module.named_modules():
        for name, tensor in submodule._parameters.items():
            if tensor is not None and id(tensor) not in made:
                wanted = _dtype(tensor, path, name, kept, dtype)
                empty = torch.empty(tensor.shape, dtype=wanted, device="meta")
                made[id(tensor)] = torch.nn.Parameter(empty, requires_grad=False)
            submodule._parameters[name] = None if tensor is None else made[id(tensor)]
        for name, buffer in submodule._buffers.items():
            if buffer is not None and name not in submodule._non_persistent_buffers_set:
                submodule._buffers[name] = buffer.to(_dtype(buffer, path, name, kept, dtype))
    network: torch.nn.Module = module.eval()
    return network


def architecture_problem(model: Model) -> str | None:
    """What of an architecture diffusers or transformers could not build, as `key: what is right`, or None.

    Of the user's own files also what those would pass over: keys of a configuration that its class does not take, and
    a number of parameters that is not the network's.
    """
    try:
        pipeline_class(model)
    except UsageError as error:
        return f"pipeline: {error}"
    scheduler = getattr(diffusers, model.scheduler.class_name, None)
    if not (isinstance(scheduler, type) and issubclass(scheduler, diffusers.SchedulerMixin)):
        return f"scheduler.class: {_unknown_class('diffusers', model.scheduler.class_name)}"
    for name, component in model.components.items():
        at = f"components.{name}"
        try:
            cls = _network_class(component)
        except UsageError as error:
            return f"{at}.class: {error}"
        if model.source is None:
            continue
        known = _known_keys(cls, component.library)
        for key in component.config:
            if known and key not in known:
                return f"{at}.config: {unknown(f'key of {component.class_name}', key, known)}"
        try:
            count = sum(parameter.numel() for parameter in build_component(component, torch.float32).parameters())
        except Exception as error:  # whatever a class thinks of its configuration
            return f"{at}.config: {component.class_name} refuses it: {' '.join(str(error).split())[:300]}"
        if component.parameters not in (None, count):
            return f"{at}.parameters: is {component.parameters}, and the configuration makes {count}"
    return None


def _known_keys(cls: Any, library: str) -> set[str]:
    if library == "diffusers":
        return set(inspect.signature(cls.__init__).parameters) - {"self"}
    return {*cls.config_class().to_dict(), *inspect.signature(cls.config_class.__init__).parameters} - {"self"}


def _unknown_class(library: str, name: str) -> str:
    near = get_close_matches(name, dir(diffusers if library == "diffusers" else transformers), n=1, cutoff=0.8)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{library} {_version(library)} has no {name}{hint}"


def _network_class(component: Component) -> Any:
    cls = getattr(diffusers if component.library == "diffusers" else transformers, component.class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        raise UsageError(_unknown_class(component.library, component.class_name))
    return cls


def _version(library: str) -> str:
    return str((diffusers if library == "diffusers" else transformers).__version__)


def _kept_in_fp32(cls: Any, library: str, dtype: torch.dtype) -> set[str]:
    """Parts that loading in half precision leaves in fp32: for transformers in fp16 only, for diffusers in bf16 too."""
    kept = set(getattr(cls, "_keep_in_fp32_modules_strict", None) or ())
    if library == "diffusers" or dtype == torch.float16:
        kept |= set(getattr(cls, "_keep_in_fp32_modules", None) or ())
    return kept


def _dtype(tensor: torch.Tensor, path: str, name: str, kept: set[str], dtype: torch.dtype) -> torch.dtype:
    if not tensor.is_floating_point():
        return tensor.dtype
    return torch.float32 if kept & {*path.split("."), name} else dtype


class Noise:
    """Small normal noise for parameters; zeros would run faster than real data. The weights of norms are near one, as
    trained ones are, so that images have contrast.

    On the host a block of noise is repeated. With `share`, host parameters are slices of one such tensor for each
    dtype, each from another offset: what only travels to the GPU needs no memory of its own, and no values of its own.
    """

    def __init__(self, device: str, modules: Iterable[torch.nn.Module], *, share: bool = False) -> None:
        self._device = device
        self._blocks: dict[torch.dtype, torch.Tensor] = {}
        self._shared: dict[torch.dtype, torch.Tensor] = {}
        self._offsets: dict[torch.dtype, int] = {}
        if share and device == "cpu":
            sizes: dict[torch.dtype, list[int]] = {}
            for module in modules:
                for parameter in module.parameters():
                    sizes.setdefault(parameter.dtype, []).append(parameter.numel())
            for dtype, counts in sizes.items():
                self._shared[dtype] = self._fill(torch.empty(max(counts) + SHARED_STRIDE * len(counts), dtype=dtype))

    def like(self, parameter: torch.Tensor, mean: float) -> torch.Tensor:
        """Noise of this shape and dtype about `mean`, on the device."""
        shared = self._shared.get(parameter.dtype)
        if shared is not None:
            offset = self._offsets[parameter.dtype] = self._offsets.get(parameter.dtype, 0) + SHARED_STRIDE
            return shared[offset:][: parameter.numel()].view(parameter.shape)
        data = self._fill(torch.empty(parameter.shape, dtype=parameter.dtype, device=self._device))
        return data.add_(mean) if mean else data

    def _fill(self, data: torch.Tensor) -> torch.Tensor:
        if data.element_size() == 1:  # float8 has no arithmetic
            return self._fill(torch.empty_like(data, dtype=torch.bfloat16)).to(data.dtype)
        if self._device != "cpu":
            return data.normal_(0, NOISE_STD)
        if not self._blocks:  # the same for all dtypes, so that what is cast differs by rounding alone
            self._blocks[torch.float32] = torch.empty(NOISE_BLOCK).normal_(0, NOISE_STD)
        if data.dtype not in self._blocks:
            self._blocks[data.dtype] = self._blocks[torch.float32].to(data.dtype)
        with _at_most(HOST_THREADS):
            for part in data.view(-1).split(NOISE_BLOCK):
                part.copy_(self._blocks[data.dtype][: part.numel()])
        return data


@contextmanager
def _at_most(threads: int) -> Iterator[None]:
    """Let PyTorch's operations on the host use no more threads than these."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(threads, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def modules_in_order(components: Mapping[str, torch.nn.Module]) -> Iterator[torch.nn.Module]:
    """All modules in the order in which `pipe.to(device)` moves them: networks by name, children before parents."""

    seen: set[torch.nn.Module] = set()

    def children_first(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
        for child in module.children():
            yield from children_first(child)
        if module not in seen:
            seen.add(module)
            yield module

    for name in sorted(components):
        yield from children_first(components[name])


def fill(components: Mapping[str, torch.nn.Module], noise: Noise, device: str, arrived: Sequence[Arrived] = ()) -> None:
    """Replace meta parameters by noise, and move the buffers to `device`, in the order of `pipe.to(device)`; then
    `arrived` may change the module, before the next one has its weights."""
    made: WeakValueDictionary[int, torch.nn.Parameter] = WeakValueDictionary()  # what `arrived` replaces is gone
    for module in modules_in_order(components):
        for name, tensor in module._parameters.items():
            if tensor is None:
                continue
            parameter = made.get(id(tensor))
            if parameter is None:
                is_norm = name in ("weight", "gamma") and "norm" in type(module).__name__.lower()
                parameter = torch.nn.Parameter(noise.like(tensor, 1.0 if is_norm else 0.0), requires_grad=False)
                made[id(tensor)] = parameter
            module._parameters[name] = parameter
            del parameter
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
        for change in arrived:
            change(module)


def assemble(model: Model, components: Mapping[str, torch.nn.Module], **attributes: Any) -> Any:
    """The model's pipeline around these networks; `attributes` are set on a subclass of it made for this call."""
    cls = pipeline_class(model)
    wanted = inspect.signature(cls.__init__).parameters
    given: dict[str, Any] = {**components, **model.pipeline_arguments}
    for name, parameter in wanted.items():
        if name == "self" or name in given:
            continue
        if name == "add_watermarker":
            given[name] = False  # SDXL's, on the CPU, and only where another package is installed
        elif name == "scheduler":
            scheduler = getattr(diffusers, model.scheduler.class_name)
            given[name] = scheduler.from_config(dict(model.scheduler.config))
        elif name.endswith("_scheduler") or name == "guider":  # as the pipeline's class has it
            given[name] = parameter.annotation()
        elif name.endswith("image_processor"):
            given[name] = transformers.CLIPImageProcessor()
        elif "tokenizer" in name or name == "processor":
            given[name] = StandInTokenizer(_sequence_length(model, name.replace("tokenizer", "text_encoder")))
        elif parameter.default is inspect.Parameter.empty:
            given[name] = None
    if attributes:
        cls = type(cls.__name__, (cls,), {**attributes, "__module__": cls.__module__})
    pipe = cls(**{name: value for name, value in given.items() if name in wanted})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _sequence_length(model: Model, encoder: str) -> int:
    component = model.components.get(encoder)
    is_clip = component is not None and component.class_name.startswith("CLIP")
    positions = int(component.config.get("max_position_embeddings", 77)) if component and is_clip else 77
    return positions if is_clip else model.native.sequence_length


def pipeline_class(model: Model) -> Any:
    """The pipeline's class in diffusers.

    Raises:
        UsageError: where this version of diffusers has none of that name.
    """
    cls = getattr(diffusers, model.pipeline, None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline)):
        raise UsageError(_unknown_class("diffusers", model.pipeline))
    return cls


def with_call_defaults(model: Model) -> Model:
    """The model with the native size, steps and guidance that its pipeline's class has as defaults.

    Raises:
        UsageError: where this version of diffusers has no such pipeline.
    """
    accepted = inspect.signature(pipeline_class(model).__call__).parameters
    names = {
        "width": "width",
        "height": "height",
        "num_frames": "frames",
        "num_inference_steps": "steps",
        "guidance_scale": "guidance_scale",
        "max_sequence_length": "sequence_length",
    }
    defaults = {ours: accepted[theirs].default for theirs, ours in names.items() if theirs in accepted}
    known = {name: value for name, value in defaults.items() if type(value) in (int, float) and value > 0}
    return model.model_copy(update={"native": model.native.model_copy(update=known)})


def random_pipeline(
    model: Model,
    dtype: torch.dtype,
    device: str,
    *,
    share: bool = False,
    prepare: Prepare | None = None,
    places: Places | None = None,
) -> Any:
    """The pipeline with random weights, its networks on `device`, but for those with other `places`; on the host they
    may `share` their storage. The weights of a network depend on its name and torch's seed alone.

    `prepare` changes the networks before they have weights.
    """
    components: Components = {name: build_component(part, dtype) for name, part in model.components.items()}
    arrived = prepare(components) if prepare else ()
    where = places(components) if places else {}
    noises = {at: Noise(at, components.values(), share=share) for at in {device, *where.values()}}
    seed = torch.initial_seed()
    for name in sorted(components):
        torch.manual_seed(seed + zlib.crc32(name.encode()))
        at = where.get(name, device)
        fill({name: components[name]}, noises[at], at, arrived)
    torch.manual_seed(seed)
    return assemble(model, components)


def pretrained_pipeline(
    model: Model,
    dtype: torch.dtype,
    device: str,
    prepare: Prepare | None = None,
    places: Places | None = None,
) -> Any:
    """The pipeline with its trained weights, from safetensors only and with no remote code, on `device`, but for
    networks with other `places`.

    `prepare` changes the networks in host memory.
    """
    cls = pipeline_class(model)
    accepted = inspect.signature(cls.__init__).parameters
    left_out = {name: None for name in NOT_MEASURED if name in accepted}
    arguments = {k: v for k, v in model.pipeline_arguments.items() if k in accepted}
    arguments |= {name: False for name in ("requires_safety_checker", "add_watermarker") if name in accepted}
    local = is_there(Path(model.hub_id))
    pipe = cls.from_pretrained(
        model.hub_id,
        dtype=dtype,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=local,
        **left_out,
        **arguments,
    )
    pipe.set_progress_bar_config(disable=True)
    parts = networks(pipe)
    arrived = prepare(parts) if prepare else ()
    pipe.register_modules(**parts)
    for change in arrived:
        for module in modules_in_order(parts):
            change(module)
    where = places(parts) if places else {}
    if not where:
        return pipe if device == "cpu" else pipe.to(device)
    for name in sorted(parts):
        parts[name].to(where.get(name, device))
    return pipe


def call_arguments(pipe: Any, case: Case, generator: torch.Generator | None) -> dict[str, Any]:
    """The keyword arguments of one call of the pipeline, from prompts to pixels, that its signature takes."""
    accepted = inspect.signature(type(pipe).__call__).parameters
    arguments = {
        "prompt": [PROMPT] * case.batch_size,
        "negative_prompt": [NEGATIVE_PROMPT] * case.batch_size if case.guidance_scale > 1 else None,
        "height": case.height,
        "width": case.width,
        "num_frames": case.frames,
        "num_inference_steps": case.steps,
        "guidance_scale": case.guidance_scale,
        "generator": generator,
        "max_sequence_length": case.sequence_length,
        "use_resolution_binning": False,  # the size that was asked for, not the nearest that the model was trained on
        "output_type": "pt",
    }
    return {name: value for name, value in arguments.items() if name in accepted and value is not None}


def denoiser_calls(pipe: Any, steps: int) -> int | None:
    """How often the denoiser runs for `steps` steps: PNDM runs it once more, Heun almost twice as often.

    Asks a copy of the pipeline's scheduler, so that the pipeline's own is left as it is. None where the scheduler
    wants more than a number of steps.
    """
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    for more in ({}, {"mu": 1.0}):  # the shift of a flow model depends on the size; the number of steps does not
        try:
            scheduler.set_timesteps(steps, **more)
        except (TypeError, ValueError):
            continue
        return len(scheduler.timesteps)
    return None


def weights_bytes(components: Mapping[str, torch.nn.Module]) -> int:
    """Bytes of all parameters and buffers, each counted once."""
    tensors = {
        id(tensor): sum(part.numel() * part.element_size() for part in stored(tensor))
        for module in components.values()
        for tensor in (*module.parameters(), *module.buffers())
    }
    return sum(tensors.values())


def stored(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold this one's values: itself, or a quantized one's parts, bitsandbytes' statistics too."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor, *_statistics(tensor)]
    return [part for name in tensor.__tensor_flatten__()[0] for part in stored(getattr(tensor, name))]


def _statistics(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What bitsandbytes keeps beside a weight: an `SCB` in 8 bits, a `quant_state` in 4, which may hold another."""
    found, state = [getattr(tensor, "SCB", None)], getattr(tensor, "quant_state", None)
    while state is not None:
        found += [state.absmax, state.code, state.offset]
        state = state.state2
    return [part for part in found if isinstance(part, torch.Tensor)]


def networks(pipe: Any) -> Components:
    """The networks of a pipeline by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
