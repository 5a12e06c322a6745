"""Flags that take several GPUs, with none."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.models import attention_dispatch

from pytest_vram.cases.case import Case
from pytest_vram.cases.models import Model, read_model, read_models
from pytest_vram.errors import Inapplicable
from pytest_vram.measure.simulation import simulate
from pytest_vram.pipelines.build import build_component
from pytest_vram.pipelines.optimizations import OPTIMIZATIONS, gpus_of, impossible

MODELS = Path(__file__).parents[1] / "models"


@pytest.fixture(autouse=True)
def _backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers keeps a backend that was set for one network for all others of the process."""
    registry = attention_dispatch._AttentionBackendRegistry
    monkeypatch.setattr(registry, "_active_backend", registry._active_backend)


def case_of(model: Model, *flags: str) -> Case:
    return Case(
        model=model.name,
        optimizations=("bf16", *flags),
        height=64,
        width=64,
        batch_size=1,
        steps=2,
        guidance_scale=3.5,
        sequence_length=model.native.sequence_length,
        scheduler=model.scheduler.class_name,
    )


def test_balanced_puts_the_largest_network_first_and_the_next_on_the_other_gpu() -> None:
    model = read_model(MODELS / "tiny-sd.toml")
    networks = {name: build_component(part, torch.float32) for name, part in model.components.items()}
    sizes = {name: sum(p.nbytes for p in network.parameters()) for name, network in networks.items()}
    places = OPTIMIZATIONS["device_map_balanced"].gpu_of(networks)
    first, second, third = sorted(sizes, key=lambda name: -sizes[name])
    assert places == {first: 0, second: 1, third: 1}


def test_the_estimate_of_balanced_networks_has_each_gpu() -> None:
    model = read_model(MODELS / "tiny-sd.toml")
    plain, balanced = (simulate(model, case_of(model, *flags)) for flags in ((), ("device_map_balanced",)))
    assert balanced.effects["device_map_balanced"] == "applied"
    assert plain.gpus == []
    assert balanced.weights == plain.weights
    first, second = (gpu["allocated_peak"] for gpu in balanced.gpus)
    assert max(first, second) == balanced.allocated_peak < plain.allocated_peak
    assert first + second >= plain.allocated_peak


@pytest.mark.parametrize("flag", ["context_parallel_ulysses", "context_parallel_ring"])
def test_a_denoiser_without_a_plan_cannot_be_run_in_parallel(flag: str) -> None:
    unet = read_model(MODELS / "tiny-sd.toml").components["unet"]
    pipe = SimpleNamespace(unet=build_component(unet, torch.float32))
    one: Any = OPTIMIZATIONS[flag]
    with pytest.raises(Inapplicable, match="no plan for UNet2DConditionModel"):
        one._enable(pipe, "unet")


@pytest.mark.parametrize("flag", ["context_parallel_ulysses", "context_parallel_ring"])
def test_in_parallel_the_denoiser_s_tokens_are_shared_and_its_weights_are_not(flag: str) -> None:
    model = read_models()["flux1-schnell"]
    small = {"num_layers": 1, "num_single_layers": 1}
    parts = {
        name: part.model_copy(update={"config": {**part.config, **small}}) for name, part in model.components.items()
    }
    model = model.model_copy(update={"components": parts})
    plain, parallel = (
        simulate(model, case_of(model, *flags).model_copy(update={"height": 1024, "width": 1024}))
        for flags in ((), (flag,))
    )
    assert parallel.effects[flag] == "applied"
    assert parallel.gpus[0] == parallel.gpus[1]
    assert parallel.weights == plain.weights
    activations = [estimate.phases["denoise"] - estimate.phases["load"] for estimate in (plain, parallel)]
    assert 0.4 * activations[0] < activations[1] < 0.95 * activations[0]


def test_a_backend_that_cannot_be_split_is_said_in_one_line() -> None:
    model = read_models()["flux1-schnell"]
    with pytest.raises(Inapplicable, match="_native_math' which does not support context parallelism"):
        simulate(model, case_of(model, "attention_native_math", "context_parallel_ulysses"))


def test_flags_that_take_two_gpus() -> None:
    for flag in ("device_map_balanced", "context_parallel_ulysses", "context_parallel_ring"):
        assert gpus_of(("bf16", flag)) == 2
        assert impossible(("bf16", flag), "cuda", "random", 1) == f"{flag} takes 2 GPUs, and torch sees 1"
        assert impossible(("bf16", flag), "cuda", "random", 2) is None
    assert gpus_of(("bf16", "vae_tiling")) == 1
    assert "excludes" in (impossible(("bf16", "device_map_balanced", "model_offload"), "cuda") or "")
