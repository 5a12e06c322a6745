"""The estimate: a real pipeline on tensors without data."""

import resource
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from pytest_vram.cases.case import Case
from pytest_vram.cases.models import Model, read_models
from pytest_vram.errors import Inapplicable
from pytest_vram.measure import generation
from pytest_vram.measure.allocator import Event, Replay, replay
from pytest_vram.measure.estimates import estimated_record
from pytest_vram.measure.probes import estimate as estimate_task
from pytest_vram.measure.simulation import Estimate, simulate
from pytest_vram.measure.trace import CUBLAS_WORKSPACE, META, OneDevice, Trace
from pytest_vram.pipelines.build import build_component, modules_in_order
from pytest_vram.pipelines.optimizations import OPTIMIZATIONS
from tests.pipelines.test_build import case_of

MODELS = read_models()
MIB = 1 << 20
KNOWN: dict[Case, Estimate] = {}


def estimate(model: Model, *optimizations: str, **changes: Any) -> Estimate:
    """The estimate of a case, made once."""
    case = case_of(model, optimizations=optimizations, **changes)
    if case not in KNOWN:
        KNOWN[case] = simulate(model, case)
    return KNOWN[case]


def simulated(model: Model, *optimizations: str) -> tuple[Estimate, list[Event]]:
    """The estimate, and the trace that was replayed for it."""
    kept: list[Event] = []

    def keep(events: Sequence[Event], **options: Any) -> Replay:
        kept.extend(events)
        return replay(events, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pytest_vram.measure.simulation.replay", keep)
        return simulate(model, case_of(model, optimizations=optimizations)), kept


@pytest.mark.parametrize(
    ("name", "dtype", "size", "side"), [("stable-diffusion-v1-5", "fp16", 2, 512), ("sdxl", "fp32", 4, 64)]
)
def test_weights_are_the_published_parameters_in_their_dtype(name: str, dtype: str, size: int, side: int) -> None:
    model = MODELS[name]
    parameters = sum(component.parameters or 0 for component in model.components.values())
    # the position ids of a CLIP text encoder are its only buffer: 77 numbers of 8 bytes
    buffers = 77 * 8 * sum("text_encoder" in part for part in model.components)
    weights = estimate(model, dtype, height=side, width=side).weights
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


def test_with_streams_the_networks_do_not_share_a_pool() -> None:
    """results/nvidia-h200 has a need of 484 MiB; with one pool for all, large weights of the text encoder would leave a
    segment that small ones of the VAE keep, and it would be 600."""
    found = estimate(MODELS["stable-diffusion-v1-5"], "bf16", "group_offload_leaf_stream")
    assert found.need / MIB == pytest.approx(484, rel=0.01)


def test_an_effect_is_seen_in_the_estimate_too(tiny: Model) -> None:
    slicing = [estimate(tiny, "fp32", "vae_slicing", batch_size=n).effects["vae_slicing"] for n in (1, 2)]
    assert slicing == ["no_effect", "applied"]
    assert estimate(tiny, "fp32", "channels_last").effects["channels_last"] == "applied"
    assert estimate(tiny, "fp32").effects == {"fp32": "applied"}


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("tf32", 1.0, 1.0),
        ("layerwise_casting", 0.25, 0.75),  # of fp32: the denoiser's weights take a quarter
        ("int8_weight_only", 0.25, 0.99),
        ("fp8_weight_only", 0.25, 0.99),
    ],
)
def test_what_a_flag_makes_of_the_weights(tiny: Model, name: str, least: float, most: float) -> None:
    plain, found = estimate(tiny, "fp32"), estimate(tiny, "fp32", name)
    assert found.effects == {"fp32": "applied", name: "applied"}
    assert least * plain.weights <= found.weights <= most * plain.weights
    assert least * plain.phases["load"] <= found.phases["load"] <= most * plain.phases["load"]


def test_fused_weights_stand_beside_the_old_ones(tiny: Model) -> None:
    plain, found = estimate(tiny, "fp32"), estimate(tiny, "fp32", "fused_qkv")
    assert found.effects["fused_qkv"] == "applied"
    assert found.weights == plain.weights
    assert plain.phases["load"] < found.phases["load"] < 2 * plain.phases["load"]


@pytest.mark.parametrize("name", [name for name in OPTIMIZATIONS if name.startswith("group_offload")])
def test_a_group_is_there_only_while_it_is_used(tiny: Model, name: str) -> None:
    plain, found = estimate(tiny, "fp32"), estimate(tiny, "fp32", name)
    assert found.effects[name] == "applied"
    assert found.phases["load"] < 64 << 10, "a few small buffers"
    assert found.phases["encode"] < plain.phases["encode"]
    leaf, block = estimate(tiny, "fp32", "group_offload_leaf"), estimate(tiny, "fp32", "group_offload_block")
    assert leaf.phases["denoise"] < block.phases["denoise"] < plain.phases["denoise"]


def test_a_quantized_network_is_offloaded_as_it_is_kept(tiny: Model) -> None:
    plain, found = (estimate(tiny, "fp32", *more, "model_offload") for more in ((), ("int8_weight_only",)))
    assert found.phases["load"] == plain.phases["load"] < 64 << 10
    assert found.phases["denoise"] < plain.phases["denoise"]


def test_what_a_pipeline_cannot_take_is_said(tiny: Model) -> None:
    with pytest.raises(Inapplicable, match=r"^attention_flash: it needs a package: pip install flash-attn$"):
        estimate(tiny, "fp32", "attention_flash")


class Heard:
    """What a task reports."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def send(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    def ask(self, event: str, **fields: Any) -> dict[str, Any]:
        self.send(event, **fields)
        return {"throttled": []}


@pytest.fixture
def unbounded() -> Iterator[None]:
    """A worker's task bounds the memory of its process, which is this one here."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)


def test_a_worker_reports_that_a_flag_is_inapplicable(tiny: Model, unbounded: None) -> None:
    case = case_of(tiny, optimizations=("fp32", "attention_flash"))
    document = {
        "id": case.id,
        "case": case.model_dump(mode="json"),
        "model": tiny.model_dump(mode="json", by_alias=True),
    }
    job = {**document, "device": "cpu", "timeout_s": 60.0}
    for task in (estimate_task, generation.run):
        heard: Any = Heard()
        task(job, heard)
        event, fields = heard.events[-1]
        assert (event, fields["message"]) == ("skipped", "attention_flash: it needs a package: pip install flash-attn")
    record = estimated_record(case, {"event": event, **fields}, 1.0)
    assert (record.status, record.reason) == ("skipped", fields["message"])


def test_attention_without_a_fused_kernel_holds_the_scores() -> None:
    query, key, value = (torch.empty(1, 2, 256, 8, dtype=torch.bfloat16, device="meta") for _ in range(3))
    peaks = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with OneDevice(), Trace() as trace, sdpa_kernel(backend):
            torch.nn.functional.scaled_dot_product_attention(query, key, value)
        peaks.append(trace.peak)
    scores = 2 * 256 * 256 * 4  # in float32
    assert peaks[0] < scores
    inputs = 5 * 2 * 256 * 8 * 4  # the three in float32, two of them scaled
    held = peaks[1] - CUBLAS_WORKSPACE
    assert scores * 9 // 4 <= held <= scores * 9 // 4 + inputs, "scores, probabilities, and a mask of a byte each"


def test_a_mask_whose_last_dimension_is_not_dense_rules_fused_kernels_out() -> None:
    query, key, value = (torch.empty(1, 2, 256, 8, dtype=torch.bfloat16, device="meta") for _ in range(3))
    biases = torch.empty(256, 256, 2, dtype=torch.bfloat16, device="meta").permute(2, 0, 1)[None]  # as T5 makes them
    peaks = {}
    for mask in (biases, biases.contiguous()):
        with OneDevice(), Trace() as trace:
            attended = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        assert attended.shape == query.shape
        peaks[mask.is_contiguous()] = trace.peak
    assert peaks[True] < 2 * 256 * 256 * 4 < peaks[False] - CUBLAS_WORKSPACE


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


def workspaces(sample: torch.Tensor, kernel: tuple[int, ...] = (3, 3)) -> list[Any]:
    """The optional workspaces of one convolution from 8 channels to 8: for each its choices, in bytes."""
    weight = torch.empty(8, 8, *kernel, dtype=sample.dtype, device=META)
    convolve = torch.nn.functional.conv2d if len(kernel) == 2 else torch.nn.functional.conv3d
    with OneDevice(), Trace() as trace:
        convolve(sample, weight, padding="same")
    return [value for number, value in trace.events if number == 0]


@pytest.mark.parametrize(
    ("dtype", "size", "choices"), [(torch.float32, 4, 2), (torch.float16, 2, 1), (torch.bfloat16, 2, 1)]
)
def test_cudnn_wants_a_workspace_for_nchw_with_a_smaller_choice_in_fp32(
    dtype: torch.dtype, size: int, choices: int
) -> None:
    sample = torch.empty(2, 8, 16, 16, dtype=dtype, device=META)
    image, weight = 2 * 8 * 16 * 16 * size, 8 * 8 * 9 * size
    copies_of_three, copies_of_two = 2 * image + weight + 512, image + weight + 512
    assert workspaces(sample) == [(copies_of_three, copies_of_two)[:choices]]


def test_cudnn_wants_no_workspace_for_nhwc() -> None:
    for dtype in (torch.float32, torch.float16):
        sample = torch.empty(2, 8, 16, 16, dtype=dtype, device=META)
        assert workspaces(sample.to(memory_format=torch.channels_last)) == []


@pytest.mark.parametrize(
    ("kernel", "wanted"), [((1, 1), 0), ((1, 3), 1), ((3, 1), 1), ((1, 1, 1), 0), ((3, 1, 1), 1)], ids=str
)
def test_a_convolution_with_a_1x1_kernel_takes_no_workspace(kernel: tuple[int, ...], wanted: int) -> None:
    sample = torch.empty(2, 8, *[16] * len(kernel), device=META)
    assert len(workspaces(sample, kernel)) == wanted


@pytest.mark.parametrize(
    ("capability", "workspace"),
    [(7.5, 8320 << 10), (8.0, 8320 << 10), (8.9, 8320 << 10), (9.0, 32 * MIB), (10.0, 32 * MIB), (12.0, 32 * MIB)],
)
def test_the_first_matrix_product_takes_the_gpus_cublas_workspace(capability: float, workspace: int) -> None:
    with OneDevice(), Trace(capability) as trace:
        matrix = torch.empty(64, 64, device=META)
        kept = matrix @ matrix
        again = matrix @ kept
        del matrix, kept, again
    assert recorded(trace) == [64 * 64 * 4, 64 * 64 * 4, workspace, 64 * 64 * 4]
    assert trace.live == workspace, "it is never given back"


def test_an_older_gpu_saves_the_difference_of_the_cublas_workspaces(tiny: Model) -> None:
    ampere = simulate(tiny, case_of(tiny), 8.6)
    assert estimate(tiny, "fp32").allocated_peak - ampere.allocated_peak == 32 * MIB - (8320 << 10)


def test_a_storage_that_dies_gives_its_block_back_once() -> None:
    with OneDevice(), Trace() as trace:
        weight = torch.empty(1024, device=META)
        trace.track(weight)
        trace.arrive(weight)
        del weight
    assert trace.events == [(1, 4096), (-1, 0)]


def test_a_storage_that_dies_on_the_host_gives_nothing_back() -> None:
    never, away, back = (torch.empty(1024, device=META) for _ in range(3))
    with OneDevice(), Trace() as trace:
        for weight in (never, away, back):
            trace.on_host(weight)
        assert trace.events == []
        trace.arrive(away)
        trace.on_host(away)
        trace.on_host(away)
        trace.arrive(back)
        assert trace.events == [(1, 4096), (-1, 0), (2, 4096)]
        del never, away, weight
        assert trace.events[3:] == []
        del back
    assert trace.events[3:] == [(-2, 0)]
    assert trace.live == 0


def test_what_is_made_where_a_storage_died_on_the_host_is_on_the_gpu() -> None:
    def places(tensors: list[torch.Tensor]) -> set[int]:
        return {tensor.untyped_storage()._cdata for tensor in tensors}

    with OneDevice(), Trace() as trace:
        tensors = [torch.empty(1024, device=META) for _ in range(100)]
        for tensor in tensors:
            trace.on_host(tensor)
        before = places(tensors)
        del tensor, tensors
        assert trace.live == 0
        made = [torch.empty(1024, device=META) for _ in range(100)]
        assert before & places(made), "PyTorch puts a storage where another one was"
        casts = [tensor.to(torch.float16) for tensor in made]
        assert trace.live == 100 * (4096 + 2048)
        del made, casts


def test_a_cast_is_where_its_tensor_is() -> None:
    weight = torch.empty(1024, device=META)
    with OneDevice(), Trace() as trace:
        trace.on_host(weight)
        half = weight.to(torch.float16)
        double = half.to(torch.float64)
        assert recorded(trace) == []
        trace.arrive(weight)
        there = weight.to(torch.float16)
        assert recorded(trace) == [4096, 2048]
        trace.arrive(double)
        assert recorded(trace) == [4096, 2048, 8192]
        del half, double, there
    assert trace.live == 4096


def test_weights_are_loaded_in_the_order_of_a_move(tiny: Model) -> None:
    components = {name: build_component(part, torch.float32) for name, part in tiny.components.items()}
    sizes: dict[int, int] = {}
    for module in modules_in_order(components):
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                sizes.setdefault(id(tensor), tensor.numel() * tensor.element_size())
    _, events = simulated(tiny, "fp32")
    load = events[: events.index((0, "enter:encode"))]
    assert [size for number, size in load if number > 0][-len(sizes) :] == list(sizes.values())


def test_an_elementwise_operator_keeps_the_strides_of_a_batch_of_one() -> None:
    """On meta alone PyTorch makes the stride of the batch anew, and the VAE would run in NHWC at batch 1."""
    tokens = torch.empty(1, 64, 32, device=META)
    with OneDevice(), Trace():
        image = tokens.transpose(-1, -2).reshape(1, 32, 8, 8)
        assert (image / 1.0).stride() == image.stride()
    assert (torch.empty(1, 64, 32).transpose(-1, -2).reshape(1, 32, 8, 8) / 1.0).stride() == image.stride()
