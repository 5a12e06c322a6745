"""Pipelines from architectures and from saved weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_vram.cases.case import Case
from pytest_vram.cases.models import Model, model_from_folder, read_models
from pytest_vram.errors import UsageError
from pytest_vram.pipelines.build import (
    build_component,
    call_arguments,
    denoiser_calls,
    networks,
    pretrained_pipeline,
    random_pipeline,
    weights_bytes,
)
from pytest_vram.pipelines.optimizations import chosen

MODELS = read_models()
COMPONENTS = [(model.name, name) for model in MODELS.values() for name in model.components]


def case_of(model: Model, **changes: Any) -> Case:
    """A small case of this model."""
    native = model.native
    values: dict[str, Any] = {
        "model": model.name,
        "optimizations": ("fp32",),
        "height": native.height,
        "width": native.width,
        "batch_size": 1,
        "steps": 2,
        "guidance_scale": native.guidance_scale,
        "sequence_length": native.sequence_length,
        "scheduler": model.scheduler.class_name,
    }
    return Case(**{**values, **changes})


@pytest.mark.parametrize(("model", "name"), COMPONENTS)
def test_parameter_counts_are_the_published_ones(model: str, name: str) -> None:
    component = MODELS[model].components[name]
    module = build_component(component, torch.float16)
    parameters = list(module.parameters())
    assert sum(parameter.numel() for parameter in parameters) == component.parameters
    assert all(parameter.is_meta for parameter in parameters)
    assert {parameter.dtype for parameter in parameters} == {torch.float16}


def test_the_vae_is_upcast_where_the_model_says_so() -> None:
    for name, upcast in (("sdxl", True), ("sdxl-turbo", True)):
        vae: Any = build_component(MODELS[name].components["vae"], torch.float16)
        assert vae.config.force_upcast is upcast


def test_what_loading_keeps_in_fp32_stays_in_fp32() -> None:
    from pytest_vram.cases.models import Component

    config = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    component = Component.model_validate({"library": "transformers", "class": "T5EncoderModel", "config": config})
    dtypes = {
        "wo" in name: parameter.dtype
        for name, parameter in build_component(component, torch.float16).named_parameters()
    }
    assert dtypes == {True: torch.float32, False: torch.float16}
    tied = {parameter.dtype for parameter in build_component(component, torch.bfloat16).parameters()}
    assert tied == {torch.bfloat16}


def test_a_class_that_the_library_lacks_is_named(tiny: Model) -> None:
    component = tiny.components["unet"].model_copy(update={"class_name": "NoSuchNet"})
    with pytest.raises(UsageError, match=r"diffusers .* has no network NoSuchNet"):
        build_component(component, torch.float16)


def test_random_weights_are_noise_and_generate(tiny: Model) -> None:
    pipe = random_pipeline(tiny, torch.float32, "cpu")
    weight = pipe.unet.conv_in.weight
    assert 0.015 < weight.std() < 0.025
    images = pipe(**call_arguments(pipe, case_of(tiny, batch_size=2), torch.Generator().manual_seed(0))).images
    assert images.shape == (2, 3, 32, 32)
    assert images.isfinite().all()


def test_no_guidance_takes_no_negative_prompt(tiny: Model) -> None:
    pipe = random_pipeline(tiny, torch.float32, "cpu")
    assert "negative_prompt" in call_arguments(pipe, case_of(tiny), None)
    assert "negative_prompt" not in call_arguments(pipe, case_of(tiny, guidance_scale=0.0), None)


def test_pndm_calls_the_denoiser_once_more_than_it_has_steps(tiny: Model) -> None:
    pipe = random_pipeline(tiny, torch.float32, "cpu")
    calls = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    pipe(**call_arguments(pipe, case_of(tiny, steps=4), None))
    assert len(calls) == denoiser_calls(pipe, 4) == 5


def test_a_saved_pipeline_is_loaded_and_generates(saved: Path) -> None:
    model = model_from_folder(saved)
    assert (model.native.width, model.native.height) == (32, 32)
    pipe = pretrained_pipeline(model, torch.float32, "cpu")
    assert pipe.safety_checker is None
    images = pipe(**call_arguments(pipe, case_of(model), torch.Generator().manual_seed(0))).images
    assert images.shape == (1, 3, 32, 32)


def test_trained_and_random_weights_take_the_same_bytes(saved: Path, tiny: Model) -> None:
    trained = pretrained_pipeline(model_from_folder(saved), torch.float16, "cpu")
    random = random_pipeline(tiny, torch.float16, "cpu")
    assert weights_bytes(networks(trained)) == weights_bytes(networks(random))


@pytest.mark.parametrize(
    ("name", "batch_size", "size", "applied"),
    [
        ("fp32", 1, 32, True),
        ("attention_slicing", 1, 32, True),
        ("vae_slicing", 1, 32, False),
        ("vae_slicing", 2, 32, True),
        ("vae_tiling", 1, 32, False),
        ("vae_tiling", 1, 64, True),
        ("channels_last", 1, 32, True),
    ],
)
def test_an_optimization_is_seen_to_take_effect_or_not(
    tiny: Model, name: str, batch_size: int, size: int, applied: bool
) -> None:
    pipe = random_pipeline(tiny, torch.float32, "cpu")
    (optimization,) = chosen([name])
    optimization.apply(pipe)
    seen = optimization.watch(pipe, "unet")
    pipe(**call_arguments(pipe, case_of(tiny, batch_size=batch_size, height=size, width=size), None))
    assert seen() is applied


@pytest.mark.parametrize("name", ["attention_slicing", "vae_slicing", "vae_tiling", "channels_last"])
def test_an_optimization_that_was_not_applied_is_not_seen(tiny: Model, name: str) -> None:
    pipe = random_pipeline(tiny, torch.float32, "cpu")
    seen = chosen([name])[0].watch(pipe, "unet")
    pipe(**call_arguments(pipe, case_of(tiny, batch_size=2, height=64, width=64), None))
    assert not seen()
