"""A case's id, and the sizes that people write."""

from typing import Any

import pytest
from pydantic import ValidationError

from pytest_vram.cases.case import Case, OwnCase, parse_bytes, parse_resolution
from pytest_vram.errors import UsageError


def case(**changes: Any) -> Case:
    facts: dict[str, Any] = {
        "model": "sdxl",
        "optimizations": ("fp16",),
        "width": 1024,
        "height": 768,
        "batch_size": 4,
        "steps": 8,
        "guidance_scale": 5.0,
        "scheduler": "EulerDiscreteScheduler",
    }
    return Case(**{**facts, **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "sdxl/fp16/1024x768/b4"),
        ({"optimizations": ("fp16", "vae_tiling")}, "sdxl/fp16+vae_tiling/1024x768/b4"),
        ({"frames": 49}, "sdxl/fp16/1024x768/f49/b4"),
        ({"limit_bytes": 8 << 30}, "sdxl/fp16/1024x768/b4/8GiB"),
        ({"limit_bytes": 3 << 29}, "sdxl/fp16/1024x768/b4/1.5GiB"),
        ({"limit_bytes": int(22.49 * 2**30)}, "sdxl/fp16/1024x768/b4/22.49GiB"),
        ({"limit_bytes": 8 * 10**9}, "sdxl/fp16/1024x768/b4/8GB"),
    ],
)
def test_id(changes: dict[str, Any], expected: str) -> None:
    assert case(**changes).id == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "tests/test_app.py::TestApp::test_painter[a/b]"),
        ({"limit_bytes": 8 << 30}, "tests/test_app.py::TestApp::test_painter[a/b]/8GiB"),
    ],
)
def test_id_of_a_case_of_ones_own(changes: dict[str, Any], expected: str) -> None:
    facts = {"model": "tests/test_app.py", "test": "TestApp::test_painter[a/b]", "build": "a.py:b", "call": "a.py:c"}
    own = OwnCase(**{**facts, **changes})
    assert own.id == expected
    assert own.optimizations == ()


def test_cases_with_the_same_facts_are_one() -> None:
    assert {case(), case()} == {case()}
    assert len({case(), case(steps=9), case(limit_bytes=1 << 33), case(weights="pretrained")}) == 4


@pytest.mark.parametrize(
    "changes", [{"batch_size": 0}, {"width": 0}, {"steps": 0}, {"optimizations": ()}, {"limit_bytes": 0}]
)
def test_impossible_case(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(changes))):
        case(**changes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GiB", 8 << 30), ("500MiB", 500 << 20), ("8GB", 8 * 10**9), ("1.5GiB", 3 << 29), (" 8 gib ", 8 << 30)],
)
def test_parse_bytes(text: str, expected: int) -> None:
    assert parse_bytes(text, "--vram-limit") == expected


@pytest.mark.parametrize(
    "text", ["", "8", "8.5", " 8 ", "0GiB", "-8GiB", "lots", "8 cards", "8 Gibit", "9" * 400 + "GiB"]
)
def test_no_size(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_bytes(text, "--vram-limit")
    message = str(caught.value)
    assert message.startswith("--vram-limit: ")
    assert repr(text) in message
    assert "8GiB" in message, "an example says how to write it"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (512, (512, 512)),
        ("512", (512, 512)),
        ("1024x768", (1024, 768)),
        ("1024×768", (1024, 768)),
        (" 64 ", (64, 64)),
        ("65536", (65536, 65536)),
    ],
)
def test_parse_resolution(value: str | int, expected: tuple[int, int]) -> None:
    assert parse_resolution(value) == expected


@pytest.mark.parametrize("value", ["", "big", "1024x", "x768", "1024*768", "1x2x3", "-512", -512, "51.2"])
def test_no_resolution(value: str | int) -> None:
    with pytest.raises(ValueError, match="is not a resolution; write 1024, 1024x768") as caught:
        parse_resolution(value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("value", [0, "0x512", "512x0", 65537, "9" * 30])
def test_resolution_out_of_range(value: str | int) -> None:
    with pytest.raises(ValueError, match="1 to 65536 pixels"):
        parse_resolution(value)
