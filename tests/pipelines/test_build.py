"""Pipelines from architectures and from saved weights."""

import contextlib
import itertools
import sys
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan, AutoencoderTiny, FluxTransformer2DModel
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from torch.overrides import TorchFunctionMode

from pytest_vram.cases.case import Case
from pytest_vram.cases.models import Component, Model, model_from_folder, read_models
from pytest_vram.errors import Inapplicable, UsageError
from pytest_vram.pipelines.build import (
    HOST_THREADS,
    NOISE_BLOCK,
    Arrived,
    Components,
    Noise,
    build_component,
    call_arguments,
    denoiser_calls,
    fill,
    modules_in_order,
    networks,
    pretrained_pipeline,
    random_pipeline,
    weights_bytes,
)
from pytest_vram.pipelines.optimizations import OPTIMIZATIONS, chosen, impossible

torch.set_num_threads(1)  # what runs here is tiny, and idle threads of a pool would spin
MODELS = read_models()
TWO = ("transformer", "transformer_2")
T5 = Component.model_validate(
    {
        "library": "transformers",
        "class": "T5EncoderModel",
        "config": {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 32},
    }
)


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


@pytest.mark.parametrize("config", [T5.config, {**T5.config, "num_heads": "many"}], ids=["built", "refused"])
def test_no_initial_values_are_computed_and_others_compute_theirs(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str] = []
    for name in ("normal_", "kaiming_uniform_"):
        monkeypatch.setattr(torch.nn.init, name, lambda *_, name=name, **__: computed.append(name))
    with contextlib.suppress(Exception):
        build_component(T5.model_copy(update={"config": config}), torch.float32)
    assert computed == []
    torch.nn.Linear(2, 2)
    assert computed == ["kaiming_uniform_"]


def test_the_vae_is_upcast_where_the_model_says_so() -> None:
    for name, upcast in (("sdxl", True), ("sdxl-turbo", True)):
        vae: Any = build_component(MODELS[name].components["vae"], torch.float16)
        assert vae.config.force_upcast is upcast


def test_what_loading_keeps_in_fp32_stays_in_fp32() -> None:
    dtypes = {
        "wo" in name: parameter.dtype for name, parameter in build_component(T5, torch.float16).named_parameters()
    }
    assert dtypes == {True: torch.float32, False: torch.float16}
    tied = {parameter.dtype for parameter in build_component(T5, torch.bfloat16).parameters()}
    assert tied == {torch.bfloat16}


def test_a_class_that_the_library_lacks_is_named(tiny: Model) -> None:
    component = tiny.components["unet"].model_copy(update={"class_name": "NoSuchNet"})
    with pytest.raises(UsageError, match=r"diffusers .* has no NoSuchNet"):
        build_component(component, torch.float16)


def test_random_weights_are_noise_and_generate(tiny: Model) -> None:
    pipe = random_pipeline(tiny, torch.float32, "cpu")
    weight = pipe.unet.conv_in.weight
    assert 0.015 < weight.std() < 0.025
    images = pipe(**call_arguments(pipe, case_of(tiny, batch_size=2), torch.Generator().manual_seed(0))).images
    assert images.shape == (2, 3, 32, 32)
    assert images.isfinite().all()


def filled(components: Components, *, share: bool = False) -> Components:
    """These networks with noise on the host."""
    fill(components, Noise("cpu", components.values(), share=share), "cpu")
    return components


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_of_norms_are_near_one_and_all_others_near_zero(tiny: Model, dtype: torch.dtype) -> None:
    parts = {name: build_component(part, dtype) for name, part in {**tiny.components, "t5": T5}.items()}
    torch.manual_seed(0)
    norms = 0
    for network in filled(parts).values():
        for name, parameter in network.named_parameters():
            is_norm = int(name.endswith("weight") and "norm" in name)  # by its path: the code asks for its class
            norms += is_norm
            assert (parameter.float() - is_norm).abs().max() < 0.15, name
            assert parameter.numel() < 32 or parameter.float().std() > 0.01, name
    assert norms > 20


def test_a_gamma_of_a_norm_is_near_one_too() -> None:
    with torch.device("meta"):
        norm = WanRMS_norm(64, bias=True)
    filled({"vae": norm})
    assert (norm.gamma - 1).abs().max() < 0.15
    assert norm.bias.abs().max() < 0.15


def test_the_same_seed_makes_the_same_weights(tiny: Model) -> None:
    def weights(seed: int, *, share: bool) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        pipe = random_pipeline(tiny, torch.float32, "cpu", share=share)
        return [weight for network in networks(pipe).values() for weight in network.parameters()]

    for share in (False, True):
        first = weights(7, share=share)
        assert all(torch.equal(*pair) for pair in zip(first, weights(7, share=share), strict=True))
        assert not any(torch.equal(*pair) for pair in zip(first, weights(8, share=share), strict=True))


def test_modules_come_in_the_order_in_which_a_pipeline_moves_them(tiny: Model) -> None:
    pipe = random_pipeline(tiny, torch.float32, "cpu")
    moved: list[int] = []

    class Moves(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.to:
                moved.append(id(args[0]))
            return func(*args, **(kwargs or {}))

    with Moves():
        pipe.to("cpu")
    ours = [
        id(tensor)
        for module in modules_in_order(networks(pipe))
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    ]
    assert len(ours) > 100
    assert ours == moved


def test_networks_come_by_name_and_children_before_parents() -> None:
    leaf, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    first, second = torch.nn.Sequential(leaf), torch.nn.Sequential(other)
    for components in ({"a": first, "b": second}, {"b": second, "a": first}):
        assert list(modules_in_order(components)) == [leaf, first, other, second]


def test_shared_weights_begin_apart_and_are_what_the_network_wants(tiny: Model) -> None:
    wanted = {name: build_component(part, torch.float16) for name, part in tiny.components.items()}
    made = networks(random_pipeline(tiny, torch.float16, "cpu", share=True))
    parameters = [parameter for network in made.values() for parameter in network.parameters()]
    assert len({parameter.data_ptr() for parameter in parameters}) == len(parameters)
    assert len({parameter.untyped_storage().data_ptr() for parameter in parameters}) == 1
    assert all(parameter.is_contiguous() for parameter in parameters)
    for name, network in wanted.items():
        shapes = {path: (parameter.shape, parameter.dtype) for path, parameter in network.named_parameters()}
        found = {path: (parameter.shape, parameter.dtype) for path, parameter in made[name].named_parameters()}
        assert found == shapes


def test_weights_have_a_storage_each_unless_they_are_to_share(tiny: Model) -> None:
    made = networks(random_pipeline(tiny, torch.float16, "cpu"))
    parameters = [parameter for network in made.values() for parameter in network.parameters()]
    assert len({parameter.untyped_storage().data_ptr() for parameter in parameters}) == len(parameters)


def test_shared_weights_take_as_much_host_memory_as_the_largest() -> None:
    with torch.device("meta"):
        layers = [torch.nn.Linear(512, size) for size in (256, 512, 256, 128, 512)]
    network = torch.nn.Sequential(*layers)
    filled({"network": network}, share=True)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in network.parameters()}
    largest = 512 * 512 * 4
    assert largest <= sum(storages.values()) < 1.05 * largest


@pytest.mark.parametrize("share", [False, True])
def test_tied_weights_stay_tied(share: bool) -> None:
    network: Any = filled({"text_encoder": build_component(T5, torch.float32)}, share=share)["text_encoder"]
    assert network.encoder.embed_tokens.weight is network.shared.weight
    assert network.shared.weight.shape == (32, 16)
    assert network(torch.tensor([[1, 2, 3]])).last_hidden_state.isfinite().all()


def test_a_pipeline_of_shared_weights_generates(tiny: Model) -> None:
    pipe = random_pipeline(tiny, torch.float32, "cpu", share=True)
    images = pipe(**call_arguments(pipe, case_of(tiny), torch.Generator().manual_seed(0))).images
    assert images.shape == (1, 3, 32, 32)
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
        ("tiny_vae", 1, 32, True),
        ("fused_qkv", 1, 32, True),
        ("tf32", 1, 32, True),
        ("layerwise_casting", 1, 32, True),
        ("int8_weight_only", 1, 32, True),
        ("fp8_weight_only", 1, 32, True),
        ("attention_native_math", 1, 32, False),  # this UNet's attention asks for no backend
    ],
)
def test_an_optimization_is_seen_to_take_effect_or_not(
    tiny: Model, name: str, batch_size: int, size: int, applied: bool
) -> None:
    (optimization,) = chosen([name])

    def prepare(parts: Components) -> list[Arrived]:
        change = optimization.prepare(parts, "unet")
        return [change] if change else []

    pipe = random_pipeline(tiny, torch.float32, "cpu", prepare=prepare)
    optimization.apply(pipe, "unet")
    seen = optimization.watch(pipe, "unet")
    pipe(**call_arguments(pipe, case_of(tiny, batch_size=batch_size, height=size, width=size), None))
    assert seen() is applied


@pytest.mark.parametrize(("kept", "applied"), [([], True), (["vae"], True), (["vae", "text_encoder"], False)])
def test_model_offload_is_seen_where_a_network_waits_in_host_memory(
    tiny: Model, kept: list[str], applied: bool
) -> None:
    pipe = random_pipeline(tiny, torch.float32, "cpu")
    for name in kept:
        getattr(pipe, name).to("meta")  # some pipelines keep a network on the GPU
    seen = chosen(["model_offload"])[0].watch(pipe, "unet")
    assert not seen(), "the denoiser has not run"
    pipe.unet(torch.zeros(1, 4, 4, 4), 0, torch.zeros(1, 4, pipe.unet.config.cross_attention_dim))
    assert seen() is applied


@pytest.mark.parametrize("name", ["attention_slicing", "vae_slicing", "vae_tiling", "channels_last", "fused_qkv"])
def test_an_optimization_that_was_not_applied_is_not_seen(tiny: Model, name: str) -> None:
    pipe = random_pipeline(tiny, torch.float32, "cpu")
    seen = chosen([name])[0].watch(pipe, "unet")
    pipe(**call_arguments(pipe, case_of(tiny, batch_size=2, height=64, width=64), None))
    assert not seen()


@pytest.mark.parametrize("name", ["int8_weight_only", "fp8_weight_only"])
def test_a_quantized_linear_layer_takes_half_and_nothing_holds_what_it_was(tiny: Model, name: str) -> None:
    (optimization,) = chosen([name])
    alive: list[weakref.ref[torch.Tensor]] = []

    def prepare(parts: Components) -> list[Arrived]:
        change = optimization.prepare(parts, "unet")
        assert change is not None

        def watched(module: torch.nn.Module) -> None:
            assert not any(isinstance(ref(), torch.Tensor) for ref in alive), "the last one's weights are gone"
            alive.clear()
            if isinstance(module, torch.nn.Linear) and module in linear:
                alive.append(weakref.ref(module.weight))
            change(module)

        linear = {module for module in parts["unet"].modules() if isinstance(module, torch.nn.Linear)}
        return [watched]

    plain, quantized = (random_pipeline(tiny, torch.bfloat16, "cpu", prepare=how) for how in (None, prepare))
    linear = sum(m.weight.numel() for m in plain.unet.modules() if isinstance(m, torch.nn.Linear))
    rows = sum(m.out_features for m in plain.unet.modules() if isinstance(m, torch.nn.Linear))
    saved = weights_bytes(networks(plain)) - weights_bytes(networks(quantized))
    assert 4 * rows <= linear - saved <= 8 * rows, (
        "a byte of two each, but for a scale of each row and what goes with it"
    )
    for one, other in zip(plain.vae.parameters(), quantized.vae.parameters(), strict=True):
        assert one.dtype == other.dtype == torch.bfloat16


def test_without_its_package_a_quantization_is_inapplicable(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(Inapplicable, match=r"^int8_weight_only: it needs a package: pip install torchao$"):
        chosen(["int8_weight_only"])[0].prepare({}, "unet")


def test_a_backend_without_its_package_and_a_method_that_is_not_there_are_inapplicable(tiny: Model) -> None:
    pipe = random_pipeline(tiny, torch.float32, "cpu")
    with pytest.raises(Inapplicable, match=r"^attention_sage: it needs a package: pip install sageattention$"):
        chosen(["attention_sage"])[0].apply(pipe, "unet")
    pipe.vae = torch.nn.Module()
    with pytest.raises(Inapplicable, match=r"^Module has no enable_tiling$"):
        chosen(["vae_tiling"])[0].apply(pipe, "unet")


def test_channels_last_is_for_convolutions_in_two_dimensions(tiny: Model) -> None:
    pipe = random_pipeline(tiny, torch.float32, "cpu")
    pipe.vae = AutoencoderKLWan(base_dim=8, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False])
    with pytest.raises(Inapplicable, match=r"^channels_last: the convolutions of AutoencoderKLWan are in three"):
        chosen(["channels_last"])[0].apply(pipe, "unet")


def test_few_threads_fill_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: HOST_THREADS + 1)
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    noise = Noise("cpu", []).like(torch.empty(3, NOISE_BLOCK, device="meta"), 0.0)
    assert numbers == [HOST_THREADS, HOST_THREADS + 1]
    assert torch.equal(noise[0], noise[2])
    assert noise.std() > 0


def test_a_model_whose_vae_has_no_tiny_one(tiny: Model) -> None:
    for network in (torch.nn.Linear(1, 1), AutoencoderKL(scaling_factor=0.5)):
        with pytest.raises(Inapplicable, match=r"^tiny_vae: "):
            chosen(["tiny_vae"])[0].prepare({"vae": network}, "unet")


def test_trained_weights_get_what_is_prepared(tiny: Model, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[str] = []

    def load(hub_id: str, **options: Any) -> torch.nn.Module:
        known.append(hub_id)
        assert options == {"dtype": torch.float32, "use_safetensors": True}
        network: torch.nn.Module = AutoencoderTiny()
        return network

    monkeypatch.setattr(AutoencoderTiny, "from_pretrained", load)

    def prepare(parts: Components) -> list[Arrived]:
        chosen(["tiny_vae"])[0].prepare(parts, "unet")
        change = chosen(["int8_weight_only"])[0].prepare(parts, "unet")
        return [change] if change else []

    model = tiny.model_copy(update={"hub_id": str(saved)})
    pipe = pretrained_pipeline(model, torch.float32, "cpu", prepare)
    assert known == ["madebyollin/taesd"]
    assert type(pipe.vae).__name__ == "AutoencoderTiny"
    seen = chosen(["int8_weight_only"])[0].watch(pipe, "unet")
    case = case_of(tiny, height=32, width=32)
    assert len(pipe(**call_arguments(pipe, case, None)).images) == 1
    assert seen()


def test_weights_under_layerwise_casting_are_the_same_but_for_rounding(tiny: Model) -> None:
    (casting,) = chosen(["layerwise_casting"])

    def prepare(parts: Components) -> list[Arrived]:
        casting.prepare(parts, "unet")
        return []

    plain: list[torch.Tensor] = []
    cast: list[torch.Tensor] = []
    for how, found in ((None, plain), (prepare, cast)):
        torch.manual_seed(0)
        found += [p.float() for p in random_pipeline(tiny, torch.float16, "cpu", prepare=how).unet.parameters()]
    for one, other in zip(plain, cast, strict=True):
        assert (one - other).abs().max() <= 0.07 * one.abs().max()  # float8 has 3 bits behind the first


ALONE = {"compilations"}  # minutes of Inductor: tests/pipelines/test_compiling.py has some
ALIKE = {"fp8_weight_only", "bnb_4bit", "quanto_int8", "gguf_q8_0"}  # each goes the way of another
PAIRS = [
    (one, other)
    for one, other in itertools.combinations(
        [n for n, o in OPTIMIZATIONS.items() if not (o.dtype or o.trained or o.one_of in ALONE or n in ALIKE)], 2
    )
    if impossible(("fp32", one, other), "cpu") is None
]


@pytest.mark.parametrize(("one", "other"), PAIRS, ids=map("+".join, PAIRS))
def test_what_is_allowed_together_works_together(tiny: Model, one: str, other: str) -> None:
    flags = chosen([one, other])

    def prepare(parts: Components) -> list[Arrived]:
        return [change for flag in flags if (change := flag.prepare(parts, "unet"))]

    try:
        pipe = random_pipeline(tiny, torch.float32, "cpu", prepare=prepare)
    except Inapplicable as error:
        if "it needs a package: pip install bitsandbytes" in str(error):
            pytest.skip(str(error))
        raise
    for flag in flags:
        flag.apply(pipe, "unet")
    seen = [flag.watch(pipe, "unet") for flag in flags]
    with warnings.catch_warnings():  # PyTorch says so of itself where it compiles bitsandbytes' functions
        warnings.filterwarnings("ignore", ".*Function.* should not be instantiated", DeprecationWarning)
        pipe(**call_arguments(pipe, case_of(tiny, batch_size=2, height=64, width=64), None))
    assert [flag.name for flag, applied in zip(flags, seen, strict=True) if not applied()] == []


def test_both_denoisers_are_changed() -> None:
    networks: Any = {name: build_component(MODELS["wan2.2-t2v-a14b"].components[name], torch.bfloat16) for name in TWO}
    chosen(["layerwise_casting"])[0].prepare(networks, "transformer")
    for network in networks.values():
        assert torch.float8_e4m3fn in {parameter.dtype for parameter in network.parameters()}


def test_a_backend_that_the_attention_asks_for_is_seen_to_run() -> None:
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    inputs = {"in_channels": 4, "joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (4, 4, 8)}
    pipe = SimpleNamespace(transformer=FluxTransformer2DModel(**sizes, **inputs))
    (backend,) = chosen(["attention_native_math"])
    seen = backend.watch(pipe, "transformer")
    tokens, text, ids = torch.zeros(1, 4, 4), torch.zeros(1, 3, 8), torch.zeros(4, 3)
    arguments = {"hidden_states": tokens, "encoder_hidden_states": text, "pooled_projections": torch.zeros(1, 8)}
    arguments |= {"timestep": torch.ones(1), "img_ids": ids, "txt_ids": torch.zeros(3, 3)}
    pipe.transformer(**arguments)
    assert not seen()
    try:
        backend.apply(pipe, "transformer")
        pipe.transformer(**arguments)
        assert seen()
    finally:
        pipe.transformer.set_attention_backend("native")  # which is one for the whole process
