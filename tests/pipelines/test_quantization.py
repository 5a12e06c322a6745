"""Fewer bits for the denoiser's weights: what they take, what they compute, and what the estimate says of both."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pytest_vram.cases.models import Component, Model
from pytest_vram.errors import Inapplicable
from pytest_vram.measure.simulation import simulate
from pytest_vram.measure.trace import META, OneDevice, Trace
from pytest_vram.pipelines.build import Noise, build_component, fill, modules_in_order, weights_bytes
from pytest_vram.pipelines.optimizations import OPTIMIZATIONS, chosen, excluded
from tests.pipelines.test_build import case_of

FLUX = Component.model_validate(
    {
        "library": "diffusers",
        "class": "FluxTransformer2DModel",
        "config": {
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 128,
            "num_attention_heads": 2,
            "in_channels": 16,
            "joint_attention_dim": 256,
            "pooled_projection_dim": 256,
            "axes_dims_rope": (16, 56, 56),
        },
    }
)
PACKAGES = {
    "int4_weight_only": ("torchao", "torchao"),
    "fp8_dynamic": ("torchao", "torchao"),
    "bnb_8bit": ("bitsandbytes", "bitsandbytes"),
    "bnb_4bit": ("bitsandbytes", "bitsandbytes"),
    "quanto_int8": ("optimum", "optimum-quanto"),
    "gguf_q8_0": ("gguf", "gguf"),
    "gguf_q4_k": ("gguf", "gguf"),
}
ON_CPU = [name for name in PACKAGES if not OPTIMIZATIONS[name].needs_gpu]
CLOSE = {"bnb_8bit": 0.02, "bnb_4bit": 0.15, "quanto_int8": 0.02, "gguf_q8_0": 0.02, "gguf_q4_k": 0.15}


def taken(name: str, rows: int, columns: int, size: int = 2) -> int:
    """Bytes of a linear layer's weight, which has elements of `size` bytes where it stays as it is."""
    whole = rows * columns
    if name == "int4_weight_only":  # padded to 1024 columns; scale and zero of each 128 in bf16
        padded = rows * -(-columns // 1024) * 1024
        return whole * size if columns % 128 else padded // 2 + padded // 128 * 4
    if name == "fp8_dynamic":  # one scale
        return whole * size if rows % 16 or columns % 16 else whole + 4
    return {
        "bnb_8bit": whole + rows * 4,
        "bnb_4bit": whole // 2 + -(-whole // 64) * 4 + 16 * 4,  # a scale of each 64, and the 16 numbers of NF4
        "quanto_int8": whole + rows * size + 2 * size,  # and two scales of activations, in buffers
        "gguf_q8_0": whole * size if columns % 32 else whole // 32 * 34,
        "gguf_q4_k": whole * size if columns % 32 else whole // 32 * 22 if columns % 256 else whole // 256 * 144,
    }[name]


def need(name: str, *, computes: bool = True) -> None:
    """Skip where the package is missing, or computes wrongly here."""
    pytest.importorskip({"optimum": "optimum.quanto"}.get(PACKAGES[name][0], PACKAGES[name][0]))
    if name == "bnb_4bit" and computes:
        from bitsandbytes.functional import has_avx512bf16

        if has_avx512bf16():
            pytest.skip("on CPUs with bf16 instructions bitsandbytes takes no rows below its block of 64")


def denoiser(dtype: torch.dtype, *names: str, device: str = "cpu") -> Any:
    """A small Flux under these flags; the same weights each time."""
    torch.manual_seed(0)
    parts = {"transformer": build_component(FLUX, dtype)}
    changes = [change for flag in chosen(names) if (change := flag.prepare(parts, "transformer"))]
    if device == "cpu":
        fill(parts, Noise("cpu", parts.values()), "cpu", changes)
    else:
        with OneDevice(), Trace():
            for module in modules_in_order(parts):
                for change in changes:
                    change(module)
    return parts["transformer"]


def called(network: Any, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(1)
    made: torch.Tensor = network(
        hidden_states=torch.randn(1, 16, 16, dtype=dtype),
        encoder_hidden_states=torch.randn(1, 8, 256, dtype=dtype),
        pooled_projections=torch.randn(1, 256, dtype=dtype),
        timestep=torch.ones(1, dtype=dtype),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(8, 3),
        return_dict=False,
    )[0]
    return made


def expected(name: str, dtype: torch.dtype) -> int:
    """Bytes of the small Flux under this flag."""
    plain = build_component(FLUX, dtype)
    layers = [m for m in plain.modules() if isinstance(m, torch.nn.Linear)]
    rest = weights_bytes({"": plain}) - sum(m.weight.numel() for m in layers) * dtype.itemsize
    return rest + sum(taken(name, m.out_features, m.in_features, dtype.itemsize) for m in layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ON_CPU)
def test_weights_take_less_and_compute_the_same(name: str, dtype: torch.dtype) -> None:
    need(name)
    plain, quantized = denoiser(dtype), denoiser(dtype, name)
    assert weights_bytes({"": quantized}) == expected(name, dtype)
    pipe = SimpleNamespace(transformer=quantized)
    (flag,) = chosen([name])
    flag.apply(pipe, "transformer")
    seen = flag.watch(pipe, "transformer")
    with torch.no_grad():
        one, other = called(plain, dtype), called(quantized, dtype)
        assert seen()
    assert other.dtype == dtype
    assert 0 < (one - other).float().norm() < CLOSE[name] * one.float().norm()
    assert weights_bytes({"": quantized}) <= expected(name, dtype), "a forward leaves nothing behind"


@pytest.mark.parametrize("name", PACKAGES)
def test_the_estimate_has_the_weights_bytes(name: str) -> None:
    need(name, computes=False)
    quantized = denoiser(torch.bfloat16, name, device="meta")
    assert weights_bytes({"": quantized}) == expected(name, torch.bfloat16)


@pytest.mark.parametrize("name", PACKAGES)
def test_without_its_package_a_quantization_is_inapplicable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, package = PACKAGES[name]
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Inapplicable, match=rf"^{name}: it needs a package: pip install {package}$"):
        chosen([name])[0].prepare({}, "transformer")


@pytest.mark.parametrize("name", ON_CPU)
def test_what_is_kept_in_float32_stays_so_and_both_denoisers_are_changed(name: str) -> None:
    need(name)
    (flag,) = chosen([name])
    parts: Any = {part: build_component(FLUX, torch.bfloat16) for part in ("transformer", "transformer_2", "other")}
    kept = parts["transformer"].single_transformer_blocks[0].proj_mlp
    kept.weight = torch.nn.Parameter(kept.weight.float(), requires_grad=False)
    change = flag.prepare(parts, "transformer")
    assert change
    fill(parts, Noise("cpu", parts.values()), "cpu", [change])
    assert kept is parts["transformer"].single_transformer_blocks[0].proj_mlp
    assert type(kept) is torch.nn.Linear
    assert kept.weight.dtype == torch.float32
    less = [weights_bytes({"": parts[part]}) for part in ("transformer_2", "transformer", "other")]
    assert less == sorted(less)
    assert less[0] == expected(name, torch.bfloat16)
    seen = flag.watch(SimpleNamespace(**parts), "transformer")
    with torch.no_grad():
        called(parts["transformer_2"], torch.bfloat16)
    assert not seen(), "one of the two was not called"


@pytest.mark.parametrize("name", ON_CPU)
def test_weights_that_are_there_before_are_quantized_too(name: str) -> None:
    need(name)
    (flag,) = chosen([name])
    plain, loaded = denoiser(torch.float32), denoiser(torch.float32)
    parts = {"transformer": loaded}
    change = flag.prepare(parts, "transformer")
    assert change
    for module in modules_in_order(parts):
        change(module)
    flag.apply(SimpleNamespace(**parts), "transformer")
    with torch.no_grad():
        one, other = called(plain, torch.float32), called(loaded, torch.float32)
    assert 0 < (one - other).norm() < CLOSE[name] * one.norm()


@pytest.mark.parametrize("name", ON_CPU)
def test_a_quantization_is_estimated(tiny: Model, name: str) -> None:
    need(name, computes=False)
    plain, found = (simulate(tiny, case_of(tiny, optimizations=("fp32", *more))) for more in ((), (name,)))
    assert found.effects == {"fp32": "applied", name: "applied"}
    assert found.weights < plain.weights
    assert found.phases["load"] < plain.phases["load"]


def test_what_a_gpu_alone_can_do_is_estimated_for_one_that_can(tiny: Model) -> None:
    for name, old in (("int4_weight_only", 7.5), ("fp8_dynamic", 8.6)):
        case = case_of(tiny, optimizations=("bf16", name))
        with pytest.raises(Inapplicable, match=rf"^{name}: needs compute capability 8.[09], and the GPU has {old}$"):
            simulate(tiny, case, old)
    with pytest.raises(Inapplicable, match=r"^int4_weight_only: its kernels take bf16 alone$"):
        simulate(tiny, case_of(tiny, optimizations=("fp16", "int4_weight_only")))
    found = simulate(tiny, case, 8.9)
    assert found.effects == {"bf16": "applied", "fp8_dynamic": "applied"}


@pytest.mark.parametrize(
    ("name", "taken_per_output", "taken_per_input", "taken_per_weight"),
    [
        ("bnb_8bit", 8, 1, 0),  # int32, float16 and bf16; the input in int8
        ("bnb_4bit", 2, 0, 2),
        ("quanto_int8", 2, 0, 2),
        ("gguf_q8_0", 2, 0, 2),
        ("int4_weight_only", 2, 2, 0),  # tinygemm's input is padded, if by nothing
        ("fp8_dynamic", 2, 1, 0),
    ],
)
def test_what_a_layer_takes_while_it_computes(
    name: str, taken_per_output: int, taken_per_input: int, taken_per_weight: int
) -> None:
    """Beside its input and weights, in bytes an element, with more outputs than the rest."""
    need(name)
    rows, inputs, outputs = 8192, 1024, 4096
    network = torch.nn.Module()
    network.layer = torch.nn.Linear(inputs, outputs, bias=False, device="meta", dtype=torch.bfloat16)
    network.dtype = torch.bfloat16  # type: ignore[assignment]
    change = chosen([name])[0].prepare({"transformer": network}, "transformer")
    assert change
    with torch.no_grad(), OneDevice(), Trace() as trace:
        sample = torch.empty(1, rows, inputs, dtype=torch.bfloat16, device=META)
        network.eval()
        change(network.layer)
        weight = trace.live
        trace.peak = trace.live
        network.layer(sample)
    workspace = 0 if name in ("bnb_8bit", "int4_weight_only") else 32 << 20
    found = trace.peak - weight - workspace
    size = rows * outputs * taken_per_output + rows * inputs * taken_per_input + inputs * outputs * taken_per_weight
    assert size <= found <= 1.01 * size + (1 << 16)


@pytest.mark.parametrize(
    ("name", "inputs", "kind", "error"),
    [("gguf_q8_0", 96, "Q8_0", 0.01), ("gguf_q4_k", 96, "Q5_0", 0.05), ("gguf_q4_k", 512, "Q4_K", 0.1)],
)
def test_gguf_blocks_are_those_of_the_package(name: str, inputs: int, kind: str, error: float) -> None:
    gguf = pytest.importorskip("gguf")
    torch.manual_seed(0)
    values = torch.randn(64, inputs)
    values[3, :32] = 0
    layer = torch.nn.Linear(inputs, 64, bias=False)
    layer.weight = torch.nn.Parameter(values, requires_grad=False)
    flag: Any = chosen([name])[0]
    flag.load()
    flag.quantize(made := flag.replace(layer, torch.float32))
    expected = gguf.GGMLQuantizationType[kind]
    assert made.weight.quant_type == expected
    packed = made.weight.as_tensor().numpy()
    if kind != "Q4_K":  # which the package only reads
        assert (packed == gguf.quants.quantize(values.numpy(), expected)).all()
    back = torch.from_numpy(gguf.quants.dequantize(packed, expected))
    assert (back - values).norm() < error * values.norm()
    assert (made(torch.eye(inputs)).T - back).abs().max() < 0.01


def test_bitsandbytes_8_bits_move_once() -> None:
    need("bnb_8bit")
    network = denoiser(torch.float32, "bnb_8bit")
    weight = network.x_embedder.weight
    weight.CB, weight.SCB = weight.data.clone(), weight.SCB.double().float()
    chosen(["bnb_8bit"])[0].apply(SimpleNamespace(transformer=network), "transformer")
    assert weight.CB.data_ptr() == weight.data_ptr()
    assert "model_offload" in excluded("bnb_8bit")
    assert "model_offload" not in excluded("bnb_4bit")


@pytest.mark.parametrize(("name", "travels"), [("bnb_4bit", True), ("gguf_q8_0", True), ("bnb_8bit", False)])
def test_a_layer_in_host_memory_is_quantized_on_the_gpu_and_goes_back(
    monkeypatch: pytest.MonkeyPatch, name: str, travels: bool
) -> None:
    need(name, computes=False)
    moves: list[str] = []
    quantized: list[list[str]] = []

    def to(module: torch.nn.Module, place: str) -> torch.nn.Module:
        moves.append(place)
        return module

    (flag,) = chosen([name])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "to", to)
    monkeypatch.setattr(flag, "quantize", lambda _: quantized.append(moves.copy()))
    parts = {"transformer": build_component(FLUX, torch.bfloat16)}
    change = flag.prepare(parts, "transformer")
    assert change is not None
    layer = next(module for module in parts["transformer"].modules() if isinstance(module, torch.nn.Linear))
    layer.weight = torch.nn.Parameter(torch.zeros(layer.weight.shape), requires_grad=False)
    change(layer)
    assert quantized == [["cuda"] if travels else []]
    assert moves == (["cuda", "cpu"] if travels else [])
