"""The estimate: a real pipeline on tensors without data."""

from typing import Any

import pytest
import torch

from pytest_vram.cases.models import Model, read_models
from pytest_vram.measure.simulation import Estimate, simulate
from pytest_vram.measure.trace import META, OneDevice, Trace
from tests.pipelines.test_build import case_of

MODELS = read_models()
MIB = 1 << 20


def estimate(model: Model, *optimizations: str, **changes: Any) -> Estimate:
    return simulate(model, case_of(model, optimizations=optimizations, **changes))


@pytest.mark.parametrize(("name", "dtype", "size"), [("stable-diffusion-v1-5", "fp16", 2), ("sdxl", "fp32", 4)])
def test_weights_are_the_published_parameters_in_their_dtype(name: str, dtype: str, size: int) -> None:
    model = MODELS[name]
    parameters = sum(component.parameters or 0 for component in model.components.values())
    # the position ids of a CLIP text encoder are its only buffer: 77 numbers of 8 bytes
    buffers = 77 * 8 * sum("text_encoder" in part for part in model.components)
    weights = estimate(model, dtype, height=64, width=64).weights
    assert weights == parameters * size + buffers


def test_stable_diffusion_at_its_native_size_is_what_an_h100_measured() -> None:
    """results/nvidia-h100-80gb-hbm3 has 2714 and 4155 MiB allocated for a batch of 1 and of 4."""
    model = MODELS["stable-diffusion-v1-5"]
    for batch_size, measured in ((1, 2714), (4, 4155)):
        found = estimate(model, "fp16", batch_size=batch_size)
        assert found.allocated_peak / MIB == pytest.approx(measured, rel=0.01)
        assert found.weights < found.allocated_peak <= found.reserved_peak
        assert found.phases["decode"] == found.allocated_peak


def test_what_a_case_takes_grows_with_its_size_and_its_batch(tiny: Model) -> None:
    small = estimate(tiny, "fp32")
    assert small.allocated_peak < estimate(tiny, "fp32", height=256, width=256).allocated_peak
    assert small.allocated_peak < estimate(tiny, "fp32", batch_size=64).allocated_peak


def test_offload_leaves_less_on_the_gpu_than_the_weights() -> None:
    model = MODELS["stable-diffusion-v1-5"]
    whole = estimate(model, "fp16")
    one_network = estimate(model, "fp16", "model_offload")
    one_layer = estimate(model, "fp16", "sequential_offload")
    assert whole.need > one_network.need > one_layer.need
    assert one_network.allocated_peak < whole.weights
    assert one_network.effects["model_offload"] == one_layer.effects["sequential_offload"] == "applied"


def test_an_effect_is_seen_in_the_estimate_too(tiny: Model) -> None:
    slicing = [estimate(tiny, "fp32", "vae_slicing", batch_size=n).effects["vae_slicing"] for n in (1, 2)]
    assert slicing == ["no_effect", "applied"]
    assert estimate(tiny, "fp32", "channels_last").effects["channels_last"] == "applied"
    assert estimate(tiny, "fp32").effects == {"fp32": "applied"}


def test_expandable_segments_reserve_less(tiny: Model) -> None:
    plain, expandable = estimate(tiny, "fp32"), estimate(tiny, "fp32", "expandable_segments")
    assert expandable.allocated_peak <= plain.allocated_peak
    assert expandable.effects["expandable_segments"] == "applied"


def recorded(trace: Trace) -> list[int]:
    """The sizes of the blocks that were taken, in bytes."""
    return [value for number, value in trace.events if number > 0 and isinstance(value, int)]


def test_a_trace_has_a_block_for_each_storage_and_none_for_a_view() -> None:
    with OneDevice(), Trace() as trace:
        tensor = torch.empty(2048, 1024, device=META)
        view = tensor.transpose(0, 1)[:10]
        doubled = tensor * 2
        assert trace.live == 16 * MIB
        del tensor
        assert trace.live == 16 * MIB  # the view holds its storage
        del view, doubled
    assert recorded(trace) == [8 * MIB] * 2
    assert trace.live == 0
    assert trace.peak == 16 * MIB


def test_small_values_stay_real_and_meet_meta_tensors() -> None:
    weight = torch.empty(10, 4, device=META)
    with OneDevice(), Trace():
        ids = torch.tensor([1, 2, 3])
        assert int(ids.max()) == 3
        assert torch.nn.functional.embedding(ids, weight).is_meta


def convolution_events(sample: torch.Tensor) -> list[int]:
    """The optional workspaces of one convolution, in bytes."""
    weight = torch.empty(8, 8, 3, 3, device=META)
    with OneDevice(), Trace() as trace:
        torch.nn.functional.conv2d(sample, weight, padding=1)
    return [value for number, value in trace.events if number == 0 and isinstance(value, int)]


def test_cudnn_wants_a_workspace_for_nchw_and_none_for_nhwc() -> None:
    sample = torch.empty(2, 8, 16, 16, device=META)
    assert convolution_events(sample) == [2 * sample.numel() * 4 + 8 * 8 * 9 * 4]
    assert convolution_events(sample.to(memory_format=torch.channels_last)) == []


def test_an_elementwise_operator_keeps_the_strides_of_a_batch_of_one() -> None:
    """On meta alone PyTorch makes the stride of the batch anew, and the VAE would run in NHWC at batch 1."""
    tokens = torch.empty(1, 64, 32, device=META)
    with OneDevice(), Trace():
        image = tokens.transpose(-1, -2).reshape(1, 32, 8, 8)
        assert (image / 1.0).stride() == image.stride()
    assert (torch.empty(1, 64, 32).transpose(-1, -2).reshape(1, 32, 8, 8) / 1.0).stride() == image.stride()
