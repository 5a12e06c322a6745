"""The packaged architecture files: what they say of themselves, against parameter counts that others published."""

import csv
import re
from pathlib import Path

import pytest

from pytest_vram.cases import models as package
from pytest_vram.cases.models import Model, find_model, read_models

FILES = sorted((Path(package.__file__).parent / "models").glob("*.toml"))
MODELS = read_models()
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

with (Path(__file__).parent / "parameters.csv").open(encoding="utf-8", newline="") as table:
    PARAMETERS = list(csv.DictReader(table))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_called_like_its_model_and_begins_with_a_sentence_about_it(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = lines[: lines.index(f'name = "{path.stem}"')]
    assert 1 <= len(comment) <= 2
    assert all(line.startswith("# ") for line in comment)
    assert comment[-1].endswith(".")
    assert all(len(line) <= 120 for line in lines if not re.match(r"\w+ = \[", line))


def test_no_name_stands_for_two_models() -> None:
    names = [name for model in MODELS.values() for name in (model.name, *model.aliases)]
    assert len(names) == len(set(names))
    assert all(name == name.lower() and "/" not in name for name in names)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("sd3", "sd3-medium"),
        ("sd35-large", "sd3.5-large"),
        ("flux-dev", "flux1-dev"),
        ("flux1-krea-dev", "flux1-dev"),
        ("qwen-image-2512", "qwen-image"),
        ("wan2.2-5b", "wan2.2-ti2v-5b"),
    ],
)
def test_what_people_type_finds_the_model(alias: str, name: str) -> None:
    assert find_model(alias, MODELS).name == name


@pytest.mark.parametrize("model", MODELS.values(), ids=lambda model: model.name)
def test_native_values_are_such_as_the_model_takes(model: Model) -> None:
    model.check_resolution(model.native.width, model.native.height)
    if model.native.frames is not None:
        model.check_frames(model.native.frames)
        assert model.frame_multiple > 1
    assert model.licence
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", model.hub_id)


def test_every_network_has_the_parameters_of_the_table() -> None:
    said = {
        (model.name, name, component.class_name, component.parameters)
        for model in MODELS.values()
        for name, component in model.components.items()
    }
    assert said == {(row["model"], row["component"], row["class"], int(row["parameters"])) for row in PARAMETERS}


@pytest.mark.parametrize(
    "row", [row for row in PARAMETERS if row["published"]], ids=lambda row: f"{row['model']}-{row['component']}"
)
def test_parameters_agree_with_what_was_published(row: dict[str, str]) -> None:
    """As a number; rounded to B or M; or as the size of a file in GB, where what stays in fp32 takes four bytes."""
    assert row["source"]
    parameters = int(row["parameters"])
    number, _, unit = row["published"].partition(" ")
    if not unit:
        assert int(number) == parameters
        return
    if unit in ("B", "M"):
        found = parameters / {"B": 1e9, "M": 1e6}[unit]
    else:
        dtype = unit.removeprefix("GB in ")
        in_fp32 = 0 if dtype == "float32" else int(row[f"fp32_in_{dtype}"])
        found = (BYTES[dtype] * (parameters - in_fp32) + 4 * in_fp32) / 1e9
    last_digit = 10.0 ** -len(number.partition(".")[2])
    assert found == pytest.approx(float(number), abs=last_digit)
