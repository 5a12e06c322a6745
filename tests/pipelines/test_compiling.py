"""torch.compile of the denoiser: that it is seen to be compiled, once, and what the other flags see of it."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from pytest_vram.errors import Inapplicable
from pytest_vram.measure.generation import _Generation
from pytest_vram.pipelines.optimizations import OPTIMIZATIONS, excluded
from pytest_vram.pipelines.optimizations.compiling import _Compiled, compile_seconds

WHOLE, BLOCKS = OPTIMIZATIONS["compile"], OPTIMIZATIONS["compile_blocks"]
BOTH = pytest.mark.parametrize("flag", [WHOLE, BLOCKS], ids=lambda flag: flag.name)


@pytest.fixture(autouse=True)
def _nothing_generated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is traced runs as it is: no compiler is needed."""
    monkeypatch.setattr(_Compiled, "backend", "eager")
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def pipeline(blocks: int = 3) -> SimpleNamespace:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    network = FluxTransformer2DModel(
        in_channels=4,
        num_layers=0,
        num_single_layers=blocks,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )
    return SimpleNamespace(transformer=network.eval())


@torch.no_grad()
def call(pipe: Any, timestep: float = 1.0, tokens: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    output: torch.Tensor = pipe.transformer(
        hidden_states=torch.randn(1, tokens, 4, generator=generator),
        encoder_hidden_states=torch.randn(1, 3, 8, generator=generator),
        pooled_projections=torch.randn(1, 8, generator=generator),
        timestep=torch.tensor([timestep]),
        img_ids=torch.zeros(tokens, 3),
        txt_ids=torch.zeros(3, 3),
        return_dict=False,
    )[0]
    return output


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@BOTH
def test_it_is_compiled_once_and_computes_the_same(flag: _Compiled) -> None:
    pipe, eager = pipeline(), call(pipeline())
    flag.apply(pipe, "transformer")
    took_effect = flag.watch(pipe, "transformer")
    before, seconds = graphs(), compile_seconds()
    assert not took_effect(), "it has not been called"
    torch.testing.assert_close(call(pipe), eager)
    assert took_effect()
    after = graphs()
    assert before < after <= before + 2, "blocks that are alike are compiled once; the first sees other strides"
    assert compile_seconds() > seconds
    seconds = compile_seconds()
    for timestep in (0.7, 0.2):
        call(pipe, timestep)
    assert graphs() == after
    assert compile_seconds() == seconds


@BOTH
def test_where_compilation_is_turned_off_it_has_no_effect(flag: _Compiled) -> None:
    pipe = pipeline(1)
    flag.apply(pipe, "transformer")
    took_effect = flag.watch(pipe, "transformer")
    with torch.compiler.set_stance("force_eager"):
        call(pipe)
    assert not took_effect()


@BOTH
def test_what_other_flags_watch_is_seen_and_compiles_nothing_anew(flag: _Compiled) -> None:
    pipe = pipeline(2)
    flag.apply(pipe, "transformer")
    seen: list[Any] = []
    once: list[str] = []

    def note(module: torch.nn.Module, _: Any, output: torch.Tensor) -> None:
        seen.append((type(module).__name__, tuple(output.shape)))

    def watched(layer: torch.nn.Module) -> None:
        def note_once(*_: Any) -> None:
            once.append("called")
            hook.remove()

        note_once.__module__ = "pytest_vram.test"
        hook = layer.register_forward_pre_hook(note_once)

    note.__module__ = "pytest_vram.test"
    for block in pipe.transformer.single_transformer_blocks:
        block.proj_mlp.register_forward_hook(note)
        watched(block.attn)
    call(pipe)
    after = graphs()
    for timestep in (0.5, 0.2):
        call(pipe, timestep)
    assert graphs() == after
    assert set(seen) == {("Linear", (1, 7, 64))}
    assert once


def test_an_offload_s_hook_stays_around_the_compiled_code() -> None:
    from accelerate import cpu_offload_with_hook

    pipe = pipeline(1)
    WHOLE.apply(pipe, "transformer")
    took_effect = WHOLE.watch(pipe, "transformer")
    cpu_offload_with_hook(pipe.transformer, execution_device="cpu")
    devices = []
    pipe.transformer.register_forward_hook(lambda module, *_: devices.append(module.device.type))
    before = graphs()
    for _ in range(3):
        call(pipe)
    assert took_effect()
    assert graphs() == before + 1
    assert devices == ["cpu"] * 3


@BOTH
def test_a_graph_that_breaks_is_a_reason_to_skip(flag: _Compiled) -> None:
    pipe = pipeline(1)
    mlp = pipe.transformer.single_transformer_blocks[0].act_mlp
    mlp.forward = torch.compiler.disable(mlp.forward)
    flag.apply(pipe, "transformer")
    with pytest.raises(Inapplicable, match=f"{flag.name}: FluxTransformer2DModel is no single graph: "):
        call(pipe)


def test_a_network_of_which_diffusers_names_no_blocks() -> None:
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        pipe = SimpleNamespace(transformer=SD3Transformer2DModel(num_layers=1))
    why = "compile_blocks: diffusers names no repeated blocks of SD3Transformer2DModel"
    with pytest.raises(Inapplicable, match=why):
        BLOCKS.apply(pipe, "transformer")
    with pytest.raises(Inapplicable, match=why):
        BLOCKS.simulate(pipe, "transformer", SimpleNamespace())
    assert WHOLE.simulate(pipe, "transformer", SimpleNamespace())()


@BOTH
def test_of_the_offloads_only_that_of_models_goes_with_it(flag: _Compiled) -> None:
    offloads = {name for name, other in OPTIMIZATIONS.items() if other.one_of == "offloads"}
    assert offloads - set(excluded(flag.name)) == {"model_offload"}
    assert {"compile", "compile_blocks"} - {flag.name} <= set(excluded(flag.name))


def test_the_memory_of_the_call_that_compiled_is_told_apart() -> None:
    generation = _Generation.__new__(_Generation)
    generation.peaks = {"load": 5, "encode": 6, "denoise": 9, "decode": 7}
    generation.set_compilation_apart()
    assert generation.peaks == {"load": 5, "compile": 9}
