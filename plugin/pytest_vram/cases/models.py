"""Models as data: one TOML architecture file each, or a saved pipeline's folder, read into one form."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from pytest_vram.cases.toml import read_toml
from pytest_vram.errors import UsageError, first_problem, printable, unknown
from pytest_vram.untrusted import MAX_TOML_BYTES, is_there, parse_json, read_text

NAME = r"^[a-z0-9][a-z0-9._-]*$"
PART = r"^[A-Za-z_][A-Za-z0-9_]{0,99}$"  # a component's name, which is a folder's too
MOST = 1 << 40  # an integer of a configuration: a frequency base may be 1e9
MOST_LAYERS = 10_000
_COUNTS = re.compile(r"layers|blocks|depth")
LIBRARIES = ("diffusers", "transformers")
RUNS_CODE = ("auto_map", "custom_pipelines", "trust_remote_code", "use_pretrained_backbone")
NOT_MEASURED = ("safety_checker", "feature_extractor")  # never loaded: they are no part of generating


Text = Annotated[str, Field(max_length=200)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)


def _harmless(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that makes no class run code of others, or build for hours."""
    walk: list[tuple[str, Any]] = [("", config)]
    for key, value in walk:  # which grows meanwhile
        if isinstance(value, (dict, list)):
            items = value.items() if isinstance(value, dict) else ((key, one) for one in value)
            walk += [(str(name), inner) for name, inner in items]
        if key in RUNS_CODE:
            raise ValueError(f"{key} makes a library run or load what is not in this file; leave it out")
        if key.endswith("attn_implementation") and "/" in str(value):
            raise ValueError(f"{key} {str(value)[:100]!r} is code of the hub, which is not run; leave it out")
        if type(value) is int:
            most = MOST_LAYERS if _COUNTS.search(key) else MOST
            if not -most <= value <= most:
                raise ValueError(f"{key}: {str(value)[:40]} is above {most}")
    return config


def _nameable(hub_id: str) -> str:
    """An id of the hub, or a folder that a file system can hold."""
    if printable(hub_id) != hub_id or any(len(part.encode()) > 255 for part in hub_id.split("/")):
        raise ValueError("is no id of the hub, and no folder")
    return hub_id


HubId = Annotated[str, Field(max_length=1000), AfterValidator(_nameable)]
Config = Annotated[dict[str, Any], AfterValidator(_harmless)]


class Component(_Table):
    """One network of the pipeline: its class, the configuration that differs from the class's defaults, its size."""

    library: Literal["diffusers", "transformers"]
    class_name: Text = Field(alias="class")
    parameters: int | None = Field(default=None, gt=0, lt=10**15)
    config: Config = {}


class Scheduler(_Table):
    """The scheduler's class in diffusers and its configuration."""

    class_name: Text = Field(alias="class")
    config: Config = {}


class Native(_Table):
    """What the model was made for: pixels, steps, guidance, tokens of the prompt, and frames where it makes videos."""

    width: int = Field(gt=0, le=65536)
    height: int = Field(gt=0, le=65536)
    steps: int = Field(gt=0, le=100_000)
    guidance_scale: float = Field(ge=0, le=1e6)
    sequence_length: int = Field(gt=0, le=100_000)
    frames: int | None = Field(default=None, gt=0, le=100_000)


class Model(_Table):
    """An architecture: everything needed to build the pipeline with random weights.

    `denoiser` and `decoder` are the components that the phases denoise and decode begin with. Widths and heights are
    multiples of `resolution_multiple`, frames one more than multiples of `frame_multiple`. `licence` and `gated`
    (whether the hub asks for a click) are those of the weights at `hub_id`.
    """

    name: Text = Field(pattern=NAME)
    aliases: tuple[Text, ...] = Field(default=(), max_length=100)
    hub_id: HubId
    licence: Text | None = None
    gated: bool = False
    pipeline: Text
    pipeline_arguments: Config = {}
    denoiser: str
    decoder: str = "vae"
    resolution_multiple: int = Field(gt=0, le=65536)
    frame_multiple: int = Field(default=1, gt=0, le=100_000)
    native: Native
    components: dict[Annotated[str, Field(pattern=PART)], Component] = Field(max_length=50)
    scheduler: Scheduler
    source: str | None = None  # the file, of an architecture of the user's own: read_models knows it

    def check_resolution(self, width: int, height: int) -> None:
        """Raise ValueError where the model cannot take this resolution."""
        multiple = self.resolution_multiple
        if width % multiple or height % multiple:
            nearest = "x".join(str(max(multiple, round(n / multiple) * multiple)) for n in (width, height))
            raise ValueError(f"{self.name} takes multiples of {multiple} pixels, not {width}x{height}; try {nearest}")

    def check_frames(self, frames: int) -> None:
        """Raise ValueError where the model cannot make this many frames."""
        if self.native.frames is None:
            raise ValueError(f"{self.name} makes images; leave frames out")
        if (frames - 1) % self.frame_multiple:
            nearest = round((frames - 1) / self.frame_multiple) * self.frame_multiple + 1
            takes = f"{self.name} takes one frame more than a multiple of {self.frame_multiple}"
            raise ValueError(f"{takes}, not {frames}; try {nearest}")

    @property
    def kind(self) -> Literal["image", "video"]:
        """What it makes."""
        return "image" if self.native.frames is None else "video"

    @property
    def disk_bytes(self) -> int:
        """Its weights on disk in half precision, two bytes a parameter."""
        return 2 * self.parameters

    @property
    def parameters(self) -> int:
        """Of all its networks together; those whose number no file says are left out."""
        return sum(component.parameters or 0 for component in self.components.values())


def read_model(path: Path) -> Model:
    """One architecture file.

    Raises:
        UsageError: naming the file and the key.
    """
    model = read_toml(path, Model).model_copy(update={"source": None})
    for key in ("denoiser", "decoder"):
        if getattr(model, key) not in model.components:
            known = ", ".join(model.components)
            raise UsageError(f"{path}: {key}: {getattr(model, key)!r} is not one of the components ({known})")
    return model


def read_models(*folders: Path) -> dict[str, Model]:
    """The packaged models and those of `folders`, by name; a later folder replaces a model of the same name."""
    packaged = Path(str(files(__package__) / "models"))
    found: dict[str, Model] = {}
    for folder in (packaged, *folders):
        for path in sorted(folder.glob("*.toml"), key=lambda path: path.stem):
            model = read_model(path)
            own = folder is not packaged
            found[model.name] = model.model_copy(update={"source": str(path)}) if own else model
    return found


def find_model(name: str, models: Mapping[str, Model]) -> Model:
    """The model called `name`, or one of its aliases.

    Raises:
        ValueError: with the nearest name.
    """
    by_name = {alias: model for model in models.values() for alias in model.aliases} | dict(models)
    if name not in by_name:
        hint = f"; for the folder write ./{name}" if is_there(Path(name) / "model_index.json") else ""
        raise ValueError(unknown("model", name, by_name) + hint)
    return by_name[name]


def is_folder(name: str) -> bool:
    """Whether a model is given as the folder of a saved pipeline rather than by name."""
    return "/" in name or "\\" in name or name.startswith(".")


def model_from_folder(folder: Path, *, with_weights: bool = True) -> Model:
    """The architecture of a pipeline saved with `save_pretrained`, read from its configuration files.

    A saved pipeline does not say with how many steps it is meant to run: 50 with guidance 7.5 stand in until the
    defaults of its class are known; an architecture file whose `hub_id` is the folder says better. Its name is the
    folder's and 8 hex digits of its configuration. Without `with_weights` the configuration files alone are enough.

    Raises:
        UsageError: when a part is missing, or has no safetensors file.
    """
    index = _read_json(folder / "model_index.json")
    components = {}
    for name, entry in index.items():
        if name.startswith("_") or name in NOT_MEASURED or not isinstance(entry, list) or len(entry) != 2:
            continue
        if not re.fullmatch(PART, name):
            raise UsageError(f"{folder / 'model_index.json'}: {name[:100]!r} is no name of a part of a pipeline")
        if with_weights and entry[0] not in (*LIBRARIES, None):
            raise UsageError(
                f"{folder / 'model_index.json'}: {name} is of {str(entry[0])[:100]!r}; parts of diffusers and of "
                "transformers are loaded, and no other code"
            )
        if entry[0] in LIBRARIES and (folder / name / "config.json").is_file():
            if with_weights:
                _require_safetensors(folder / name)
            config = {k: v for k, v in _read_json(folder / name / "config.json").items() if not k.startswith("_")}
            components[name] = {"library": entry[0], "class": entry[1], "config": config}
    denoiser = next((name for name in ("transformer", "unet") if name in components), None)
    if denoiser is None or "vae" not in components:
        raise UsageError(f"{folder}: model_index.json names no denoiser (unet or transformer) and VAE")
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    try:
        multiple = 2 ** (len(components["vae"]["config"].get("block_out_channels", [0] * 4)) - 1)
        sample = components[denoiser]["config"].get("sample_size") or 64
        height, width = (s * multiple for s in (sample if isinstance(sample, list) else (sample, sample)))
        lengths = [c["config"].get("max_position_embeddings", 77) for n, c in components.items() if "text" in n]
        return Model.model_validate(
            {
                "name": unique_name(folder.resolve().name, components, scheduler),
                "hub_id": str(folder),
                "pipeline": index["_class_name"],
                "pipeline_arguments": {k: v for k, v in index.items() if isinstance(v, bool)},
                "denoiser": denoiser,
                "resolution_multiple": multiple,
                "native": {
                    "width": width,
                    "height": height,
                    "steps": 50,
                    "guidance_scale": 7.5,
                    "sequence_length": max(lengths, default=77),
                },
                "components": components,
                "scheduler": {
                    "class": scheduler["_class_name"],
                    "config": {k: v for k, v in scheduler.items() if not k.startswith("_")},
                },
            }
        )
    except ValidationError as error:
        raise UsageError(first_problem(error, folder)) from error
    except KeyError as error:
        raise UsageError(f"{folder}: the key {error} is missing from its configuration") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"{folder}: its configuration is not what save_pretrained writes: {error}") from error


def unique_name(basename: str, *configuration: Any) -> str:
    """A name for an architecture that has none: the basename and 8 hex digits of what it is made of."""
    digits = hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:8]
    stem = re.sub(r"[^a-z0-9._-]+", "-", basename.lower()).strip("-._") or "model"
    return f"{stem[:100]}-{digits}"


def _require_safetensors(folder: Path) -> None:
    found = list(folder.glob("*.safetensors"))
    if found and all(len(path.suffixes) > 1 for path in found):  # model.fp16.safetensors
        raise UsageError(f"{folder}: only variants of the weights ({found[0].name}); save them without a variant")
    if not found:
        raise UsageError(
            f"{folder}: no .safetensors file; weights are loaded from nothing else: "
            "save the pipeline again with save_pretrained(folder, safe_serialization=True)"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = parse_json(read_text(path, UsageError, MAX_TOML_BYTES), path, UsageError)
    except UsageError as error:
        raise UsageError(f"{error}; a pretrained model is a folder that save_pretrained wrote") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path}: is no JSON object; a pretrained model is a folder that save_pretrained wrote")
    return value


def names_with_aliases(models: Iterable[Model]) -> dict[str, list[str]]:
    """Aliases by model name, of the models that have any."""
    return {model.name: list(model.aliases) for model in models if model.aliases}
