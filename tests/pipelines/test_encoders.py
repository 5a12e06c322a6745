"""Text encoders that are not on the GPU while the denoiser runs."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pytest_vram.cases.models import Model, read_models
from pytest_vram.errors import Inapplicable
from pytest_vram.measure import generation
from pytest_vram.measure.subject import SweepSubject
from pytest_vram.measure.trace import META, OneDevice, Trace
from pytest_vram.pipelines.build import call_arguments, networks, random_pipeline, weights_bytes
from pytest_vram.pipelines.optimizations import OPTIMIZATIONS, excluded
from pytest_vram.pipelines.optimizations.encoders import _encode_once
from tests.measure.test_simulation import Heard, estimate
from tests.pipelines.test_build import case_of

ON_CPU, DROPPED = OPTIMIZATIONS["text_encoders_on_cpu"], OPTIMIZATIONS["text_encoders_dropped"]
BOTH = pytest.mark.parametrize("flag", [ON_CPU, DROPPED], ids=lambda flag: flag.name)


def job_of(tiny: Model, *optimizations: str, **more: Any) -> dict[str, Any]:
    case = case_of(tiny, optimizations=("fp32", *optimizations))
    documents = {"case": case.model_dump(mode="json"), "model": tiny.model_dump(mode="json", by_alias=True)}
    return {"id": case.id, **documents, "device": "cpu", "timeout_s": 60.0, **more}


def image(pipe: Any, tiny: Model) -> torch.Tensor:
    pixels: torch.Tensor = pipe(**call_arguments(pipe, case_of(tiny), torch.Generator().manual_seed(0))).images
    return pixels


def calls_of(owner: Any, method: str) -> list[Any]:
    """The keyword arguments of every call of this method from now on."""
    calls: list[Any] = []
    original: Callable[..., Any] = getattr(owner, method)

    def noting(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return original(*args, **kwargs)

    setattr(owner, method, noting)
    return calls


def is_gone(network: torch.nn.Module) -> bool:
    return all(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))


def test_each_excludes_the_other_and_every_offload() -> None:
    offloads = {name for name, flag in OPTIMIZATIONS.items() if flag.one_of == "offloads"}
    assert set(excluded(ON_CPU.name)) >= {DROPPED.name, *offloads}
    assert set(excluded(DROPPED.name)) >= {ON_CPU.name, *offloads}
    assert ON_CPU.name in excluded("model_offload")
    assert "vae_tiling" not in excluded(ON_CPU.name)


def test_what_goes_to_the_gpu_at_once() -> None:
    parts = ("text_encoder", "text_encoder_2", "transformer", "vae")
    assert ON_CPU.at_once(parts) == {"transformer", "vae"}
    assert DROPPED.at_once(parts) == {"text_encoder", "text_encoder_2"}
    assert OPTIMIZATIONS["model_offload"].at_once(parts) == set()


@BOTH
def test_a_subject_moves_what_goes_at_once(tiny: Model, flag: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []

    def to(self: torch.nn.Module, *_: Any, **__: Any) -> torch.nn.Module:
        moved.append(type(self).__name__)
        return self

    monkeypatch.setattr(torch.nn.Module, "to", to)
    SweepSubject(job_of(tiny, flag.name)).build("cuda")
    expected = {ON_CPU: ["UNet2DConditionModel", "AutoencoderKL"], DROPPED: ["CLIPTextModel"]}[flag]
    assert moved == expected


@BOTH
def test_a_pipeline_that_encodes_no_prompt(tiny: Model, flag: Any) -> None:
    with pytest.raises(Inapplicable, match=r"^SimpleNamespace has no encode_prompt$"):
        flag.apply(SimpleNamespace(components={}), "unet")
    pipe = random_pipeline(tiny, torch.float32, "cpu")
    pipe.text_encoder = None
    with pytest.raises(Inapplicable, match=r"^StableDiffusionPipeline has no text encoder$"):
        flag.apply(pipe, "unet")


def test_dropped_after_the_first_prompt_the_image_is_the_same(tiny: Model) -> None:
    torch.manual_seed(0)
    plain = image(random_pipeline(tiny, torch.float32, "cpu"), tiny)
    torch.manual_seed(0)
    pipe = random_pipeline(tiny, torch.float32, "cpu")
    encoder, forwards = pipe.text_encoder, calls_of(pipe.text_encoder, "forward")
    DROPPED.apply(pipe, "unet")
    seen = DROPPED.watch(pipe, "unet")
    assert not is_gone(encoder)
    assert not seen()
    seen = DROPPED.watch(pipe, "unet")
    for _ in range(2):
        assert torch.equal(image(pipe, tiny), plain)
        assert len(forwards) == 2, "the prompt and the negative one, both in the first call"
    assert is_gone(encoder)
    assert (encoder.dtype, encoder.config.hidden_size) == (torch.float32, 32)
    assert seen()


def test_the_other_networks_come_when_the_encoders_are_gone(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = random_pipeline(tiny, torch.float32, "cpu")
    events: list[str] = []
    original = torch.nn.Module.to

    def to(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        events.append(f"{type(self).__name__} {'gone' if is_gone(pipe.text_encoder) else 'there'}")
        return original(self, *args, **kwargs)

    DROPPED.apply(pipe, "unet")
    pipe.text_encoder.register_forward_hook(lambda *_: events.append("encoded"))
    pipe.unet.register_forward_hook(lambda *_: events.append("step"))
    monkeypatch.setattr(torch.nn.Module, "to", to)
    image(pipe, tiny)
    assert events[:4] == ["encoded", "encoded", "UNet2DConditionModel gone", "AutoencoderKL gone"]
    assert set(events[4:]) == {"step"}


def test_a_prompt_that_is_not_kept_is_an_error(tiny: Model) -> None:
    pipe = random_pipeline(tiny, torch.float32, "cpu")
    DROPPED.apply(pipe, "unet")
    image(pipe, tiny)
    with pytest.raises(RuntimeError, match="the text encoders are gone"):
        pipe("another prompt")


def test_a_pipeline_that_writes_into_its_prompts_gets_what_was_kept() -> None:
    def encode(prompts: list[str], times: int) -> list[str]:
        prompts[0] += "!"
        return prompts * times

    pipe = SimpleNamespace(encode_prompt=encode, unet=torch.nn.Identity())
    _encode_once(pipe, "unet", lambda: None)
    prompts = ["a prompt"]
    for _ in range(2):
        embeddings = pipe.encode_prompt(prompts, times=2)
        pipe.unet(0)
        assert embeddings == ["a prompt!", "a prompt!"]
        embeddings.clear()  # which is the caller's


@BOTH
def test_without_the_flag_it_is_not_seen(tiny: Model, flag: Any) -> None:
    pipe = random_pipeline(tiny, torch.float32, "cpu")
    seen = flag.watch(pipe, "unet")
    image(pipe, tiny)
    assert not seen()


def test_encoders_on_the_cpu_run_there_and_give_what_they_make_to_the_denoisers_device(tiny: Model) -> None:
    pipe = random_pipeline(tiny, torch.float32, "cpu")
    places: list[tuple[str, str]] = []
    pipe.text_encoder.register_forward_hook(
        lambda _, given, output: places.append((output[0].device.type, pipe._execution_device.type))
    )
    for network in (pipe.unet, pipe.vae):
        network.to(META)  # stands for the GPU
    ON_CPU.apply(pipe, "unet")
    for arguments in (("a prompt", META, 1, True), ("a prompt", META, 1, False)):
        prompt, negative = pipe.encode_prompt(*arguments)
        assert prompt.shape == (1, 77, 32)
        assert prompt.is_meta
        assert negative is None or negative.is_meta
    assert places == [("cpu", "cpu")] * 3
    assert pipe._execution_device == META


def test_that_encoders_are_elsewhere_is_seen(tiny: Model) -> None:
    pipe = random_pipeline(tiny, torch.float32, "cpu")
    seen = ON_CPU.watch(pipe, "unet")
    pipe.text_encoder.to(META)
    for hook in pipe.unet._forward_hooks.values():
        hook(pipe.unet, (), None)
    assert seen()
    assert not pipe.unet._forward_hooks


@pytest.mark.parametrize("more", [{}, {"probe": True}])
def test_a_worker_measures_a_case_of_dropped_encoders(tiny: Model, more: dict[str, Any]) -> None:
    heard: Any = Heard()
    common = {"rounds": 2, "round_budget_s": 1.0, "save_images": None}
    generation.run(job_of(tiny, DROPPED.name, **common, **more), heard)
    event, found = heard.events[-1]
    assert event == "done", found
    if not more:
        assert found["effects"] == {"fp32": "applied", DROPPED.name: "applied"}
        assert len(found["rounds"]) == 2


def test_trained_weights_too(tiny: Model, saved: Any) -> None:
    model = tiny.model_copy(update={"hub_id": str(saved)})
    job = job_of(model, DROPPED.name)
    job["case"]["weights"] = "pretrained"
    subject = SweepSubject(job)
    pipe = subject.build("cpu")
    seen = subject.watch(pipe)[DROPPED.name]
    assert subject.call(pipe, "cpu").images.isfinite().all()
    assert seen()


def test_the_estimate_of_dropped_encoders(tiny: Model) -> None:
    plain, found = estimate(tiny, "fp32"), estimate(tiny, "fp32", DROPPED.name)
    parts = networks(random_pipeline(tiny, torch.float32, "cpu"))
    encoders = weights_bytes({"text_encoder": parts["text_encoder"]})
    assert found.effects[DROPPED.name] == "applied"
    assert encoders <= found.phases["load"] < 1.15 * encoders, "each tensor is rounded up"
    assert plain.phases["denoise"] - found.phases["denoise"] == pytest.approx(encoders, rel=0.1)


def test_the_estimate_of_encoders_on_the_cpu(tiny: Model) -> None:
    plain, found = estimate(tiny, "fp32"), estimate(tiny, "fp32", ON_CPU.name)
    parts = networks(random_pipeline(tiny, torch.float32, "cpu"))
    encoders = weights_bytes({"text_encoder": parts.pop("text_encoder")})
    assert found.effects[ON_CPU.name] == "applied"
    assert found.phases["load"] == pytest.approx(weights_bytes(parts), rel=0.05)
    assert plain.phases["denoise"] - found.phases["denoise"] == pytest.approx(encoders, rel=0.1)


def test_need_is_that_of_the_larger_half() -> None:
    model = read_models()["stable-diffusion-v1-5"]
    case = {"width": 128, "height": 128}
    plain, found = (estimate(model, "bf16", *more, **case) for more in ((), (DROPPED.name,)))
    encoders = 2 * sum(part.parameters or 0 for name, part in model.components.items() if "text_encoder" in name)
    assert 0.95 * encoders < plain.need - found.need < 1.1 * encoders, "where tensors fit into holes changes too"


def test_what_is_computed_on_the_host_takes_nothing() -> None:
    weight = torch.empty(1024, 1024, device=META)
    with OneDevice(), Trace() as trace:
        with trace.host():
            trace.on_host(weight)
            product = weight @ weight
            embedding = product[:16]
        assert trace.events == []
        moved = embedding.clone()
    assert trace.events == [(1, 16 * 1024 * 4)]
    assert moved.shape == (16, 1024)
