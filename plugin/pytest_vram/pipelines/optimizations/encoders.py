"""Where the text encoders are while the denoiser runs."""

import gc
import inspect
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from pytest_vram.errors import Inapplicable
from pytest_vram.pipelines.optimizations.base import Optimization, Seen, denoisers, taken

if TYPE_CHECKING:
    import torch

    from pytest_vram.pipelines.offload import Recorder


class _Elsewhere(Optimization):
    """The text encoders are not on the GPU while the denoiser runs. All that runs them must be `encode_prompt`."""

    one_of = "places of the text encoders"
    excludes = frozenset({"offloads"})  # which take them from the GPU by themselves
    offloads = True

    def watch(self, pipe: Any, denoiser: str) -> Seen:
        away: list[bool] = []
        encoders = _text_encoders(pipe).values()

        def note(network: "torch.nn.Module", *_: Any) -> None:
            here = next(network.parameters()).device
            away.append(all(weight.device != here for encoder in encoders for weight in encoder.parameters()))

        notes = [network.register_forward_hook(note) for network in denoisers(pipe, denoiser)]

        def seen() -> bool:
            for handle in notes:  # it takes its time, and rounds come next
                handle.remove()
            return bool(away) and all(away)

        return seen


class TextEncodersOnCpu(_Elsewhere):
    name = "text_encoders_on_cpu"
    call = 'pipe.encode_prompt(..., device="cpu"), then pipe(prompt_embeds=...)'
    summary = "the text encoders stay in host memory and run on the CPU; their outputs go to the GPU"
    needs_gpu = True

    def at_once(self, networks: Iterable[str]) -> set[str]:
        return {name for name in networks if not _is_text_encoder(name)}

    def apply(self, pipe: Any, denoiser: str) -> None:
        import torch

        _text_encoders(pipe)
        gpu = device = next(getattr(pipe, denoiser).parameters()).device
        encode = pipe.encode_prompt
        signature = inspect.signature(encode)

        def on_cpu(*args: Any, **kwargs: Any) -> Any:
            nonlocal device
            device = torch.device("cpu")
            given = signature.bind(*args, **kwargs)
            if "device" in signature.parameters:
                given.arguments["device"] = device
            try:
                embeddings = encode(*given.args, **given.kwargs)
            finally:
                device = gpu
            return _each(embeddings, lambda tensor: tensor.to(gpu))

        _set_execution_device(pipe, lambda: device)
        pipe.encode_prompt = on_cpu

    def simulate(self, pipe: Any, denoiser: str, recorder: "Recorder") -> Seen:
        from pytest_vram.pipelines.build import modules_in_order, networks
        from pytest_vram.pipelines.offload import Unit

        encoders = _text_encoders(pipe)
        there = Unit(list(modules_in_order(encoders)), recorder)
        others = {name: network for name, network in networks(pipe).items() if name not in encoders}
        Unit(list(modules_in_order(others)), recorder).load()
        encode = pipe.encode_prompt

        def on_cpu(*args: Any, **kwargs: Any) -> Any:
            with recorder.host():
                embeddings = encode(*args, **kwargs)
            return _each(embeddings, lambda tensor: tensor.clone())

        pipe.encode_prompt = on_cpu
        return lambda: not there.loads


class TextEncodersDropped(_Elsewhere):
    """What a user does who calls `encode_prompt`, deletes the text encoders and then loads the rest: so the first call
    encodes, and the denoiser and the VAE come where it reaches the denoiser; later calls get the embeddings kept."""

    name = "text_encoders_dropped"
    call = "pipe.encode_prompt(...), del pipe.text_encoder, then pipe(prompt_embeds=...)"
    summary = "prompts are encoded once, by the first call; then the text encoders go, and the other networks come"
    exact = True

    def at_once(self, networks: Iterable[str]) -> set[str]:
        return {name for name in networks if _is_text_encoder(name)}

    def apply(self, pipe: Any, denoiser: str) -> None:
        import torch

        from pytest_vram.pipelines.build import networks

        encoders = _text_encoders(pipe)
        others = {name: network for name, network in networks(pipe).items() if name not in encoders}
        device = next(next(iter(encoders.values())).parameters()).device

        def exchange() -> None:
            for encoder in encoders.values():
                _release(encoder)
            gc.collect()
            torch.cuda.empty_cache()  # does nothing where CUDA is not initialised
            for name in sorted(others):
                others[name].to(device)

        _set_execution_device(pipe, lambda: device)
        _encode_once(pipe, denoiser, exchange)

    def simulate(self, pipe: Any, denoiser: str, recorder: "Recorder") -> Seen:
        from pytest_vram.pipelines.build import modules_in_order, networks
        from pytest_vram.pipelines.offload import Unit

        encoders = _text_encoders(pipe)
        others = {name: network for name, network in networks(pipe).items() if name not in encoders}
        first, then = (Unit(list(modules_in_order(parts)), recorder) for parts in (encoders, others))
        first.load()

        def exchange() -> None:
            first.drop()
            recorder.empty_cache()
            then.load()

        _encode_once(pipe, denoiser, exchange)
        return lambda: then.loaded and not first.loaded


def _is_text_encoder(name: str) -> bool:
    return "text_encoder" in name


def _text_encoders(pipe: Any) -> "dict[str, torch.nn.Module]":
    """By name.

    Raises:
        Inapplicable: when the pipeline has none, or no `encode_prompt`.
    """
    from pytest_vram.pipelines.build import networks

    taken(pipe, "encode_prompt")
    encoders = {name: network for name, network in networks(pipe).items() if _is_text_encoder(name)}
    if not encoders:
        raise Inapplicable(f"{type(pipe).__name__} has no text encoder")
    return encoders


def _set_execution_device(pipe: Any, device: "Callable[[], torch.device]") -> None:
    """Where the pipeline makes its tensors; diffusers before 0.42 takes the place of any network for it."""
    cls = type(pipe)
    changed = {"_execution_device": property(lambda _: device()), "__module__": cls.__module__}
    pipe.__class__ = type(cls.__name__, (cls,), changed)


def _encode_once(pipe: Any, denoiser: str, then: Callable[[], None]) -> None:
    """Keep what `encode_prompt` gives in the first call of the pipeline, which may be several times; call `then` where
    it reaches the denoiser."""
    kept: dict[str, Any] = {}
    encode = pipe.encode_prompt
    gone = False

    def once(*args: Any, **kwargs: Any) -> Any:
        key = repr((args, kwargs))
        if key not in kept:
            if gone:
                raise RuntimeError("another prompt than the first call's, and the text encoders are gone")
            own = {name: _each(value) for name, value in kwargs.items()}  # Z-Image writes into the list of prompts
            kept[key] = encode(*_each(args), **own)
        return _each(kept[key])

    def reached(*_: Any) -> None:
        nonlocal gone
        gone = True
        for handle in hooks:
            handle.remove()
        then()

    pipe.encode_prompt = once
    hooks = [network.register_forward_pre_hook(reached) for network in denoisers(pipe, denoiser)]


def _each(value: Any, change: "Callable[[torch.Tensor], torch.Tensor]" = lambda tensor: tensor) -> Any:
    """Copies of lists and tuples, with their tensors changed."""
    if isinstance(value, (list, tuple)):
        return type(value)(_each(part, change) for part in value)
    return change(value) if hasattr(value, "untyped_storage") else value


def _release(network: "torch.nn.Module") -> None:
    """Leave the shapes and dtypes of its weights, which pipelines ask for."""
    import torch

    for module in network.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                shape = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
                module._parameters[name] = torch.nn.Parameter(shape, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
