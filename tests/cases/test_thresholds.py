"""How much worse is worse: limits by metric, model and id, from two files; bad input is one line with file and key."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_vram.cases.sweep import read_sweep, read_thresholds
from pytest_vram.cases.thresholds import Limits, Thresholds, read_project
from pytest_vram.errors import UsageError

MIB = 1 << 20
TABLE = "[tool.pytest-vram.thresholds]\n"
SWEEP = '[sweeps.default.blocks.a]\nmodels = ["sdxl"]\noptimizations = ["fp16"]\n[thresholds]\n'
ID = "sdxl/fp16/1024x1024/b1"
DEFAULTS = {
    "allocated": {"relative": 0.02, "absolute": 32 * MIB},
    "need": {"relative": 0.02},
    "host": {"relative": 0.05, "absolute": 256 * MIB},
    "time": {"relative": 0.05, "absolute_s": 0.01, "stored_relative": 0.15},
}


def table(**found: Any) -> Thresholds:
    return Thresholds.model_validate(found)


def project(folder: Path, text: str | bytes) -> Path:
    path = folder / "pyproject.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def of(*tables: Thresholds, metric: str = "allocated", model: str = "sdxl", id: str = ID) -> dict[str, Any]:
    return Limits(tables).of(metric, model, id)


@pytest.mark.parametrize("metric", DEFAULTS)
def test_the_defaults(metric: str) -> None:
    assert of(metric=metric) == of(Thresholds(), table(only=[{"models": ["sdxl"]}]), metric=metric) == DEFAULTS[metric]


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ("allocated", {"relative": 0.5}),
        ("allocated", {"absolute": "1MiB"}),
        ("need", {"absolute": "64MiB"}),
        ("host", {"relative": 0.5, "absolute": "1GiB"}),
        ("time", {"absolute_s": 1.0}),
        ("time", {"relative": 0.5}),
        ("time", {"stored_relative": 0.5}),
    ],
)
def test_a_partial_table_leaves_the_other_keys_and_the_other_metrics(metric: str, said: dict[str, Any]) -> None:
    sizes = {"1MiB": MIB, "64MiB": 64 * MIB, "1GiB": 1024 * MIB}
    expected = {key: sizes.get(value, value) for key, value in said.items()}
    for other, default in DEFAULTS.items():
        assert of(table(**{metric: said}), metric=other) == {**default, **(expected if other == metric else {})}


def test_later_tables_go_before_earlier_key_by_key() -> None:
    first = table(allocated={"relative": 0.1, "absolute": "1MiB"})
    second = table(allocated={"relative": 0.2})
    assert of(first, second) == {"relative": 0.2, "absolute": MIB}
    assert of(second, first) == {"relative": 0.1, "absolute": MIB}


def test_the_table_of_a_single_case_goes_last() -> None:
    first = table(allocated={"relative": 0.1, "absolute": "1MiB"}, only=[{"ids": ["*"], "host": {"relative": 0.1}}])
    own = table(
        allocated={"relative": 0.2},
        only=[{"models": ["sdxl"], "need": {"relative": 0.3}}, {"models": ["sd"], "need": {"relative": 0.4}}],
    )
    both = Limits([first, table(allocated={"relative": 0.9})], {ID: own, "other": table(host={"relative": 0.5})})
    assert both.of("allocated", "sdxl", ID) == {"relative": 0.2, "absolute": MIB}
    assert both.of("need", "sdxl", ID)["relative"] == 0.3
    assert both.of("host", "sdxl", ID)["relative"] == 0.1
    assert both.of("host", "sdxl", "other")["relative"] == 0.5
    for id in ("sdxl", f"{ID}#2", ID.upper(), f"{ID}*", "*", ""):
        assert both.of("allocated", "sdxl", id) == {"relative": 0.9, "absolute": MIB}
    assert Limits([first], {}).of("allocated", "sdxl", ID) == Limits([first]).of("allocated", "sdxl", ID)


def test_what_is_said_of_some_cases_goes_before_what_its_table_says_of_all() -> None:
    some = table(
        allocated={"relative": 0.1, "absolute": "1MiB"},
        only=[
            {"models": ["sdxl"], "allocated": {"relative": 0.2}},
            {"ids": ["*/b1"], "allocated": {"relative": 0.3}},
            {"models": ["sd"], "allocated": {"relative": 0.4}},
        ],
    )
    assert of(some) == {"relative": 0.3, "absolute": MIB}
    assert of(some, id="sdxl/fp16/1024x1024/b4") == {"relative": 0.2, "absolute": MIB}
    assert of(some, model="other", id="x") == {"relative": 0.1, "absolute": MIB}
    assert of(some, table(allocated={"relative": 0.9})) == {"relative": 0.9, "absolute": MIB}


@pytest.mark.parametrize(
    ("only", "concerned"),
    [
        ({}, True),
        ({"models": ["sdxl"]}, True),
        ({"models": ["sd", "sdxl"]}, True),
        ({"models": ["sd"]}, False),
        ({"models": ["sd*"]}, False),
        ({"models": ["SDXL"]}, False),
        ({"ids": [ID]}, True),
        ({"ids": ["sdxl/*"]}, True),
        ({"ids": ["*/b?"]}, True),
        ({"ids": ["none", "*fp16*"]}, True),
        ({"ids": ["sdxl"]}, False),
        ({"ids": ["fp16"]}, False),
        ({"ids": ["SDXL/*"]}, False),
        ({"ids": ["*/b??"]}, False),
        ({"models": ["sdxl"], "ids": ["*/b1"]}, True),
        ({"models": ["sdxl"], "ids": ["*/b4"]}, False),
        ({"models": ["sd"], "ids": ["*/b1"]}, False),
    ],
)
def test_limits_of_some_models_and_ids(only: dict[str, Any], concerned: bool) -> None:
    found = of(table(only=[{**only, "host": {"relative": 0.5}}]), metric="host")
    assert found["relative"] == (0.5 if concerned else 0.05)


def test_the_id_of_a_parametrized_test_is_a_pattern_of_itself() -> None:
    id = "tests/test_app.py::test_painter[fp16-1]"
    assert of(table(only=[{"ids": [id], "host": {"relative": 0.5}}]), metric="host", id=id)["relative"] == 0.5


@pytest.mark.parametrize(
    ("pattern", "id", "matches"),
    [
        ("t[a]", "t[a]", True),
        ("t[a]", "ta", False),
        ("t[!a]", "tb", False),
        ("t[!a]", "t[!a]", True),
        ("t[a-c]", "tb", False),
        ("t[*]", "t[fp16-1]", True),
        ("t[*]", "t*", False),
        ("t[?]", "t[a]", True),
        ("t[?]", "t[ab]", False),
        ("*[a]", "x::t[a]", True),
        ("[[]", "[[]", True),
        ("[[]", "[", False),
        ("[", "[", True),
        ("t[a][b]", "t[a][b]", True),
    ],
)
def test_a_bracket_is_a_bracket(pattern: str, id: str, matches: bool) -> None:
    found = of(table(only=[{"ids": [pattern], "host": {"relative": 0.5}}]), metric="host", id=id)
    assert found["relative"] == (0.5 if matches else 0.05)


# Where they are written


def test_the_table_of_pyproject(tmp_path: Path) -> None:
    text = """
    [project]
    name = "app"
    [tool.pytest-vram.thresholds]
    allocated = { relative = 0.1, absolute = "64MiB" }
    time.absolute_s = 1
    [[tool.pytest-vram.thresholds.only]]
    models = ["sdxl"]
    need.absolute = "1 GB"
    """
    project(tmp_path, text)
    found = read_project(tmp_path)
    assert of(found) == {"relative": 0.1, "absolute": 64 * MIB}
    assert of(found, metric="time") == {**DEFAULTS["time"], "absolute_s": 1}
    assert of(found, metric="need") == {"relative": 0.02, "absolute": 10**9}
    assert of(found, metric="need", model="sd") == {"relative": 0.02}


@pytest.mark.parametrize(
    "text", ["", "[tool.other]\na = 1", "[tool]", "[tool.pytest-vram]", TABLE, '[project]\nname = "a"', "tool = 3"]
)
def test_a_project_that_says_nothing(text: str, tmp_path: Path) -> None:
    project(tmp_path, text)
    assert read_project(tmp_path) == Thresholds()


def test_no_project(tmp_path: Path) -> None:
    assert read_project(tmp_path) == Thresholds()
    assert read_project(tmp_path / "gone") == Thresholds()


def test_the_table_of_a_matrix_goes_with_its_sweeps(tmp_path: Path) -> None:
    path = tmp_path / "matrix.toml"
    path.write_text(SWEEP + "host.relative = 0.5\n", encoding="utf-8")
    assert of(read_thresholds(path), metric="host") == {"relative": 0.5, "absolute": 256 * MIB}
    assert read_sweep(path, "default").blocks.keys() == {"a"}
    path.write_text(SWEEP.replace("[thresholds]", ""), encoding="utf-8")
    assert read_thresholds(path) == Thresholds()


def test_the_matrix_goes_before_the_project(tmp_path: Path) -> None:
    project(tmp_path, TABLE + "host = { relative = 0.1, absolute = '1GiB' }")
    path = tmp_path / "matrix.toml"
    path.write_text(SWEEP + "host.relative = 0.5\n", encoding="utf-8")
    found = of(read_project(tmp_path), read_thresholds(path), metric="host")
    assert found == {"relative": 0.5, "absolute": 1024 * MIB}


# What is none: a share is above 0 and no more than 100; a size is written like 32MiB

BAD = [
    ("colour = 1", "colour"),
    ("allocated = 3", "allocated"),
    ("allocated = []", "allocated"),
    ("reserved = { relative = 0.1 }", "reserved"),
    ("allocated = { relativ = 0.1 }", "allocated.relativ"),
    ("allocated = { relative = -1 }", "allocated.relative"),
    ("allocated = { relative = 0 }", "allocated.relative"),
    ("allocated = { relative = 100.1 }", "allocated.relative"),
    ("allocated = { relative = inf }", "allocated.relative"),
    ("allocated = { relative = nan }", "allocated.relative"),
    ('allocated = { relative = "5 %" }', "allocated.relative"),
    ("allocated = { relative = [0.1] }", "allocated.relative"),
    ("allocated = { absolute = 64 }", "allocated.absolute"),
    ("allocated = { absolute = true }", "allocated.absolute"),
    ('allocated = { absolute = "64" }', "allocated.absolute"),
    ('allocated = { absolute = "0MiB" }', "allocated.absolute"),
    ('allocated = { absolute = "-1MiB" }', "allocated.absolute"),
    ('allocated = { absolute = "64 Mib/s" }', "allocated.absolute"),
    ('allocated = { absolute = "a\\nb" }', "allocated.absolute"),
    ("allocated = { absolute_s = 1 }", "allocated.absolute_s"),
    ("need = { relative = 0 }", "need.relative"),
    ("host = { stored_relative = 1 }", "host.stored_relative"),
    ('time = { absolute = "1MiB" }', "time.absolute"),
    ("time = { absolute_s = 0 }", "time.absolute_s"),
    ("time = { absolute_s = inf }", "time.absolute_s"),
    ("time = { absolute_s = nan }", "time.absolute_s"),
    ("time = { absolute_s = 1e7 }", "time.absolute_s"),
    ('time = { absolute_s = "1" }', "time.absolute_s"),
    ('time = { absolute_s = "0.5" }', "time.absolute_s"),
    ("time = { absolute_s = true }", "time.absolute_s"),
    ('time = { relative = "0.5" }', "time.relative"),
    ('time = { stored_relative = "1" }', "time.stored_relative"),
    ("time = { stored_relative = -0.1 }", "time.stored_relative"),
    ("only = {}", "only"),
    ("only = [1]", "only.0"),
    ('only = [{ models = "sdxl" }]', "only.0.models"),
    ("only = [{ models = [] }]", "only.0.models"),
    ("only = [{ ids = [] }]", "only.0.ids"),
    ("only = [{ ids = [1] }]", "only.0.ids.0"),
    ("only = [{}, { colour = 1 }]", "only.1.colour"),
    ("only = [{ need = { relative = 0 } }]", "only.0.need.relative"),
    ("only = [{ only = [] }]", "only.0.only"),
    ('"a\\nb\\u001b[31m" = 1', ""),
]


@pytest.mark.parametrize(("text", "key"), BAD)
def test_bad_input_is_one_line_with_the_file_and_the_key(text: str, key: str, tmp_path: Path) -> None:
    path = project(tmp_path, TABLE + text)
    matrix = tmp_path / "matrix.toml"
    matrix.write_text(SWEEP + text, encoding="utf-8")
    readers: list[tuple[Path, str, Callable[[], Thresholds]]] = [
        (path, "tool.pytest-vram.thresholds", lambda: read_project(tmp_path)),
        (matrix, "thresholds", lambda: read_thresholds(matrix)),
    ]
    for file, within, read in readers:
        with pytest.raises(UsageError) as caught:
            read()
        line = str(caught.value)
        assert line.startswith(f"{file}: {within}.{key}: " if key else f"{file}: {within}.")
        assert "\n" not in line


@pytest.mark.parametrize("text", ["relative = true", "relative = false"])
def test_a_share_that_is_a_switch(text: str, tmp_path: Path) -> None:
    project(tmp_path, TABLE + f"host = {{ {text} }}\ntime = {{ {text} }}\nneed = {{ relative = true }}")
    with pytest.raises(UsageError, match=r"need\.relative") as caught:
        read_project(tmp_path)
    assert "2 more" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (b"[tool]\npytest-vram = 3", "tool.pytest-vram: "),
        (b"[tool.pytest-vram]\nthresholds = 1", "tool.pytest-vram.thresholds: "),
        (b"[tool.pytest-vram]\nthreshold = {}", "tool.pytest-vram.threshold: "),
        (b"[tool", ""),
        (b"a = 1\na = 2", ""),
        (b"a = '\xff'", ""),
        (b"a = " + b"[" * 5000, ""),
        (b"a = " + b"9" * 5000, ""),
    ],
    ids=["no table", "no thresholds", "another table", "torn", "twice", "no text", "deep", "long"],
)
def test_a_broken_project_is_one_line_with_the_file(content: bytes, key: str, tmp_path: Path) -> None:
    path = project(tmp_path, content)
    with pytest.raises(UsageError) as caught:
        read_project(tmp_path)
    assert str(caught.value).startswith(f"{path}: {key}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "key"), [("", "sweeps"), ("[thresholds]", "sweeps"), ("[", ""), (None, "")])
def test_a_matrix_that_is_none_is_one_line(content: str | None, key: str, tmp_path: Path) -> None:
    path = tmp_path / "matrix.toml"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        read_thresholds(path)
    assert str(caught.value).startswith(f"{path}: {key}")
    assert "\n" not in str(caught.value)
