"""Architecture files, and the folder of a saved pipeline read as one."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from pytest_vram.cases.models import (
    Model,
    find_model,
    is_folder,
    model_from_folder,
    names_with_aliases,
    read_model,
    read_models,
)
from pytest_vram.errors import UsageError

TINY = Path(__file__).parents[1] / "models" / "tiny-sd.toml"

FOLDER: dict[str, dict[str, Any]] = {
    "model_index.json": {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": [None, None],
        "requires_safety_checker": True,
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
    "scheduler/scheduler_config.json": {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
    "text_encoder/config.json": {"hidden_size": 32, "max_position_embeddings": 64},
    "unet/config.json": {"_class_name": "UNet2DConditionModel", "sample_size": [48, 96], "in_channels": 4},
    "vae/config.json": {"_class_name": "AutoencoderKL", "block_out_channels": [32, 64, 64]},
    "safety_checker/config.json": {"hidden_size": 32},
}


def saved(folder: Path, **changes: Any) -> Path:
    """A saved pipeline's folder, as far as its architecture is read; `changes` replace whole files."""
    for name, value in {**FOLDER, **changes}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        if path.name == "config.json" and path.parent.name != "safety_checker":
            (path.parent / "diffusion_pytorch_model.safetensors").touch()
    return folder


def index(**changes: Any) -> dict[str, Any]:
    return {**FOLDER["model_index.json"], **changes}


def refusal(path: Path) -> str:
    """The one line with which the file or folder at `path` is refused."""
    with pytest.raises(UsageError) as caught:
        model_from_folder(path) if path.is_dir() else read_model(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message.removeprefix(str(path))


def test_read_model() -> None:
    model = read_model(TINY)
    assert (model.name, model.aliases, model.denoiser) == ("tiny-sd", ("tiny",), "unet")
    assert (model.native.width, model.native.steps, model.native.frames) == (32, 3, None)
    assert model.components["vae"].class_name == "AutoencoderKL"
    assert model.scheduler.config == {"skip_prk_steps": True}


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("aliases =", "alias =", ": alias: is not a key of this table"),
        ("steps = 3", "stepps = 3", ": native.steps: field required (and 1 more)"),
        ("sample_size = 16\n", "sample_size = 16\n[components.unet.extra]\n", ": components.unet.extra: is not a key"),
        ('pipeline = "StableDiffusionPipeline"\n', "", ": pipeline: field required"),
        ('class = "CLIPTextModel"\n', "", ": components.text_encoder.class: field required"),
        ('library = "transformers"', 'library = "tensorflow"', ": components.text_encoder.library: "),
        ("width = 32", "width = 0", ": native.width: "),
        ('name = "tiny-sd"', 'name = "tiny/sd"', ": name: "),
        ('denoiser = "unet"', 'denoiser = "transformer"', ": denoiser: 'transformer' is not one of the components"),
        ("[native]", "[native", ": "),
    ],
)
def test_bad_model_file(old: str, new: str, expected: str, tmp_path: Path) -> None:
    text = TINY.read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "bad.toml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    assert refusal(path).startswith(expected)


def test_model_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(b'name = "\xff"')
    assert "is not UTF-8 text" in refusal(path)


def test_read_models_adds_to_the_packaged(tmp_path: Path) -> None:
    packaged = read_models()
    assert set(packaged) >= {"stable-diffusion-v1-5", "sdxl", "sdxl-turbo"}
    own = TINY.read_text(encoding="utf-8").replace("tiny-sd", "sdxl")
    (tmp_path / "own.toml").write_text(own, encoding="utf-8")
    models = read_models(TINY.parent, tmp_path)
    assert set(models) == {*packaged, "tiny-sd"}
    assert models["sdxl"].native.width == 32, "a later folder replaces a model of the same name"


def test_find_model() -> None:
    models = read_models()
    assert find_model("sdxl", models) is models["sdxl"]
    assert find_model("sd-food", models) is models["stable-diffusion-v1-5"]
    with pytest.raises(ValueError, match=r"unknown model 'sdxl-turbbo'; did you mean 'sdxl-turbo'\?"):
        find_model("sdxl-turbbo", models)
    with pytest.raises(ValueError, match=r"unknown model '%%%' \(known: "):
        find_model("%%%", models)


def test_a_name_goes_before_an_alias() -> None:
    tiny = read_model(TINY)
    other = tiny.model_copy(update={"name": "other", "aliases": ("tiny-sd",)})
    assert find_model("tiny-sd", {"tiny-sd": tiny, "other": other}) is tiny


def test_aliases_of_the_models_that_have_any() -> None:
    found = names_with_aliases(read_models().values())
    assert found["stable-diffusion-v1-5"] == ["sd-food"]
    assert "sdxl" not in found


@pytest.mark.parametrize(
    ("size", "nearest"), [((99, 64), "96x64"), ((64, 101), "64x104"), ((3, 3), "8x8"), ((1021, 7), "1024x8")]
)
def test_resolution_the_model_cannot_take(size: tuple[int, int], nearest: str) -> None:
    model = read_models()["sdxl"]
    model.check_resolution(1024, 8)
    with pytest.raises(ValueError, match=rf"sdxl takes multiples of 8 pixels, not {size[0]}x{size[1]}; try {nearest}$"):
        model.check_resolution(*size)


def test_folder(tmp_path: Path) -> None:
    model = model_from_folder(saved(tmp_path / "My Model"))
    assert re.fullmatch("my-model-[0-9a-f]{8}", model.name)
    assert (model.pipeline, model.denoiser) == ("StableDiffusionPipeline", "unet")
    assert model.hub_id == str(tmp_path / "My Model")
    assert (model.resolution_multiple, model.native.width, model.native.height) == (4, 384, 192)
    assert model.native.sequence_length == 64
    assert set(model.components) == {"text_encoder", "unet", "vae"}
    assert model.components["unet"].config == {"sample_size": [48, 96], "in_channels": 4}
    assert (model.scheduler.class_name, model.scheduler.config) == ("PNDMScheduler", {"skip_prk_steps": True})


@pytest.mark.parametrize("library", ["stable_diffusion", "transformers"])
def test_folder_leaves_the_safety_checker_out(library: str, tmp_path: Path) -> None:
    names = index(safety_checker=[library, "SafetyChecker"])
    assert "safety_checker" not in model_from_folder(saved(tmp_path, **{"model_index.json": names})).components


def test_folder_reads_a_transformer(tmp_path: Path) -> None:
    names = {name: entry for name, entry in index(transformer=["diffusers", "DiT"]).items() if name != "unet"}
    folder = saved(tmp_path, **{"model_index.json": names, "transformer/config.json": {"sample_size": 32}})
    model = model_from_folder(folder)
    assert (model.denoiser, model.native.width) == ("transformer", 128)


def test_folder_without_safetensors(tmp_path: Path) -> None:
    weights = saved(tmp_path) / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    message = refusal(tmp_path)
    assert message.startswith("/vae: no .safetensors file")
    assert "save_pretrained(folder, safe_serialization=True)" in message


@pytest.mark.parametrize("name", ["model_index.json", "scheduler/scheduler_config.json"])
def test_folder_with_a_file_missing(name: str, tmp_path: Path) -> None:
    (saved(tmp_path) / name).unlink()
    assert refusal(tmp_path).startswith(f"/{name}: No such file or directory; a pretrained model is a folder")


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [("{", "is not JSON"), ("[" * 100_000, "is not JSON"), ("[]", "is no JSON object")],
    ids=["cut off", "nested", "list"],
)
def test_folder_with_bad_json(name: str, text: str, expected: str, tmp_path: Path) -> None:
    saved(tmp_path, **{name: text})
    assert refusal(tmp_path).startswith(f"/{name}: {expected}")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        (
            "model_index.json",
            {"vae": ["diffusers", "AutoencoderKL"]},
            "names no denoiser (unet or transformer) and VAE",
        ),
        ("model_index.json", index(_class_name=None), "pipeline"),
        ("model_index.json", {k: v for k, v in index().items() if k != "_class_name"}, "'_class_name' is missing"),
        ("scheduler/scheduler_config.json", {}, "'_class_name' is missing"),
    ],
)
def test_folder_without_what_a_model_needs(name: str, value: dict[str, Any], expected: str, tmp_path: Path) -> None:
    saved(tmp_path, **{name: value})
    assert expected in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_index.json", index(unet=[])),
        ("model_index.json", index(unet=["diffusers"])),
        ("unet/config.json", {"sample_size": "big"}),
        ("unet/config.json", {"sample_size": [1, 2, 3]}),
        ("vae/config.json", {"block_out_channels": 4}),
        ("vae/config.json", {"block_out_channels": []}),
        ("text_encoder/config.json", {"max_position_embeddings": None}),
    ],
)
def test_folder_with_a_value_of_the_wrong_type(name: str, value: dict[str, Any], tmp_path: Path) -> None:
    assert refusal(saved(tmp_path, **{name: value}))


@pytest.mark.parametrize(
    ("name", "expected"), [("sdxl", False), ("./sdxl", True), (".", True), ("runs/sdxl", True), ("..\\sdxl", True)]
)
def test_is_folder(name: str, expected: bool) -> None:
    assert is_folder(name) is expected


@pytest.mark.parametrize("model", read_models().values(), ids=lambda model: model.name)
def test_a_packaged_model_takes_its_native_resolution(model: Model) -> None:
    model.check_resolution(model.native.width, model.native.height)
