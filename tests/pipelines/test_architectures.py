"""The packaged architecture files, built on the meta device: size, dtypes, defaults, sizes they take."""

import contextlib
import copy
import csv
import functools
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers

from pytest_vram.cases.models import Component, Model, read_models
from pytest_vram.pipelines.build import _kept_in_fp32, assemble, build_component
from tests.pipelines.networks import network

MODELS = read_models()
DTYPES = (torch.float16, torch.bfloat16)
EACH = pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
with (Path(__file__).parents[1] / "cases" / "parameters.csv").open(encoding="utf-8", newline="") as table:
    PARAMETERS = {(row["model"], row["component"]): row for row in csv.DictReader(table)}


def class_of(component: Component) -> Any:
    return getattr(diffusers if component.library == "diffusers" else transformers, component.class_name)


@EACH
def test_parameters_and_those_that_stay_in_fp32_are_the_published_ones(model: Model) -> None:
    for name, component in model.components.items():
        row = PARAMETERS[model.name, name]
        published = {dtype: int(row[f"fp32_in_{str(dtype).removeprefix('torch.')}"]) for dtype in DTYPES}
        kept = [_kept_in_fp32(class_of(component), component.library, dtype) for dtype in DTYPES]
        same = kept[0] == kept[1]  # then one network tells of both
        for dtype in DTYPES[1:] if same else DTYPES:
            parameters = list(network(component, dtype).parameters())
            assert sum(parameter.numel() for parameter in parameters) == component.parameters
            in_fp32 = sum(parameter.numel() for parameter in parameters if parameter.dtype == torch.float32)
            assert {in_fp32} == (set(published.values()) if same else {published[dtype]}), (name, dtype)


SMALL = [
    Component.model_validate({"library": library, "class": name, "config": config})
    for library, name, config in (
        ("transformers", "T5EncoderModel", {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1}),
        ("transformers", "UMT5EncoderModel", {"d_model": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1}),
        ("transformers", "CLIPTextModel", {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}),
        ("diffusers", "AutoencoderKL", {"block_out_channels": [32]}),
        (
            "diffusers",
            "WanTransformer3DModel",
            {"num_attention_heads": 1, "attention_head_dim": 12, "num_layers": 1, "ffn_dim": 8, "text_dim": 8},
        ),
        (
            "diffusers",
            "Kandinsky5Transformer3DModel",
            {
                "model_dim": 8,
                "ff_dim": 8,
                "time_dim": 8,
                "in_text_dim": 8,
                "in_text_dim2": 8,
                "num_text_blocks": 1,
                "num_visual_blocks": 1,
                "axes_dims": [2, 2, 4],
            },
        ),
        (
            "diffusers",
            "Krea2Transformer2DModel",
            {
                "in_channels": 4,
                "num_layers": 1,
                "attention_head_dim": 6,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "intermediate_size": 8,
                "timestep_embed_dim": 4,
                "text_hidden_dim": 4,
                "num_text_layers": 3,
                "text_num_attention_heads": 2,
                "text_num_key_value_heads": 1,
                "text_intermediate_size": 8,
                "axes_dims_rope": [2, 2, 2],
            },
        ),
    )
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("component", SMALL, ids=lambda component: component.class_name)
def test_dtypes_are_those_that_from_pretrained_gives(component: Component, dtype: torch.dtype, tmp_path: Path) -> None:
    cls = class_of(component)
    if component.library == "diffusers":
        cls.from_config(component.config).save_pretrained(tmp_path)
    else:
        cls(cls.config_class(**component.config)).save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path, torch_dtype=dtype)
    built = build_component(component, dtype)
    assert {n: p.dtype for n, p in built.named_parameters()} == {n: p.dtype for n, p in loaded.named_parameters()}
    assert torch.float32 not in {p.dtype for p in loaded.parameters()} or any(
        name in component.class_name for name in ("T5", "Wan", "Kandinsky5", "Krea2")
    )


@EACH
def test_the_configuration_says_nothing_that_is_the_default(model: Model) -> None:
    found = [
        f"{name}.{key}"
        for name, component in model.components.items()
        for key in superfluous(class_of(component), component.config)
    ]
    scheduler = getattr(diffusers, model.scheduler.class_name)
    found += [f"scheduler.{key}" for key in superfluous(scheduler, model.scheduler.config)]
    assert found == []


def superfluous(cls: Any, config: dict[str, Any]) -> Iterator[str]:
    """Keys that `cls` does not have, or that change nothing."""
    if issubclass(cls, diffusers.ConfigMixin):
        accepted = inspect.signature(cls.__init__).parameters
        for key, value in config.items():
            if key not in accepted or _plain(accepted[key].default) == value:
                yield key
        return
    whole = cls.config_class(**copy.deepcopy(config)).to_dict()
    for path in _paths(config):
        less = copy.deepcopy(config)
        functools.reduce(dict.__getitem__, path[:-1], less).pop(path[-1])
        with contextlib.suppress(Exception):  # without this key it is no configuration
            if cls.config_class(**less).to_dict() == whole:
                yield ".".join(path)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=repr))


def _paths(config: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from _paths(value, (*above, key))


@EACH
def test_the_scheduler_knows_every_key_of_its_configuration(model: Model) -> None:
    scheduler = getattr(diffusers, model.scheduler.class_name)
    made, unused = scheduler.from_config(dict(model.scheduler.config), return_unused_kwargs=True)
    assert unused == {}
    for key, value in model.scheduler.config.items():
        assert made.config[key] == value


@pytest.fixture
def complaints(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What pipelines warn of while they check their inputs."""
    said: list[str] = []
    for model in MODELS.values():
        module = sys.modules[getattr(diffusers, model.pipeline).__module__]
        monkeypatch.setattr(module.logger, "warning", said.append, raising=False)
    return said


def pipeline(model: Model) -> Any:
    return assemble(model, {name: network(part, torch.bfloat16) for name, part in model.components.items()})


def check(pipe: Any, model: Model, **size: int) -> None:
    given = {
        "prompt": "a prompt",
        "height": model.native.height,
        "width": model.native.width,
        "max_sequence_length": model.native.sequence_length,
        "guidance_scale": model.native.guidance_scale,
        "callback_steps": 1,
        **size,
    }
    checks = pipe.check_inputs if hasattr(pipe, "check_inputs") else pipe  # Z-Image checks when it is called
    accepted = inspect.signature(checks).parameters
    checks(**{n: given.get(n) for n, p in accepted.items() if n in given or p.default is p.empty})


@EACH
def test_the_pipeline_takes_the_native_size_and_not_half_a_multiple_more(model: Model, complaints: list[str]) -> None:
    """Some pipelines refuse it, some warn and make something smaller. What else they do, the next test sees."""
    pipe = pipeline(model)
    if hasattr(pipe, "check_inputs"):
        check(pipe, model)
    assert complaints == []
    rule_is_elsewhere = {
        "hidream-i1",  # sizes of its own
        "hunyuan-video-1.5",  # checks nothing
        "kandinsky-2.2",  # makes it a multiple of 64 without a word
        "cogvideox-2b",  # asks for multiples of 8, and patches of 2 make it 16
        "cogvideox-5b",
        "pixart-sigma",
        "wan2.2-ti2v-5b",  # asks for multiples of 16, and its VAE makes it 32
    }
    if model.name not in rule_is_elsewhere:
        with contextlib.suppress(ValueError):
            check(pipe, model, height=model.native.height + model.resolution_multiple // 2)
            assert complaints != []


@EACH
def test_frames_come_in_the_multiples_of_the_vae(model: Model) -> None:
    """CogVideoX decodes two latent frames at a time: an even number of them makes three frames too many."""
    pipe = pipeline(model)
    names = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
    of_one = next((getattr(pipe, name) for name in names if hasattr(pipe, name)), 1)
    at_a_time = pipe.vae.num_latent_frames_batch_size if model.pipeline == "CogVideoXPipeline" else 1
    assert model.frame_multiple == of_one * at_a_time
