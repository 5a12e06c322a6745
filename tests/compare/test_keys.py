"""What makes two runs, or two records, incomparable, and what is only remarked."""

import json
from typing import Any

import pytest

from pytest_vram.cases.case import Case
from pytest_vram.compare.comparison import SHOWN, Difference
from pytest_vram.compare.keys import case_difference, hard_differences, known_key, remarks
from pytest_vram.errors import UsageError
from pytest_vram.records.schema import Record
from tests.compare.test_comparing import a_run
from tests.records.test_schema import OWN, facts, own, record

HARD = ("gpu", "mig", "power_limit_w", "driver", "torch", "cuda", "device", "start", "variables")
REMARKED = (
    *("diffusers", "transformers", "accelerate", "pytest-vram", "python", "cudnn"),
    *("gpu_uuid", "host", "cpu", "cpus", "os"),
)
ONE = {name: f"one {name}" for name in (*HARD, *REMARKED)}


def pair(base: dict[str, Any], head: dict[str, Any]) -> Any:
    """Two runs whose environment and device are these."""
    return tuple(
        a_run(environment=facts, options={"device": facts["device"]} if "device" in facts else {}).run
        for facts in (base, head)
    )


def keys(differences: list[Difference]) -> list[str]:
    return [difference.key for difference in differences]


@pytest.mark.parametrize("key", HARD)
@pytest.mark.parametrize("other", ["another", None, 3])
def test_a_hard_key_that_differs(key: str, other: Any) -> None:
    base, head = pair(ONE, {**ONE, key: other})
    [found] = hard_differences(base, head)
    assert (found.key, found.base) == (key, f"one {key}")
    assert found.head == {"another": "another", None: "{}" if key == "variables" else "not known", 3: "3"}[other]
    expected = ["driver version"] if key == "driver" else []
    assert keys(remarks(base, head)) == expected


def test_all_hard_keys_that_differ_are_found() -> None:
    assert keys(hard_differences(*pair(ONE, dict.fromkeys(ONE, "another")))) == list(HARD)


@pytest.mark.parametrize("key", REMARKED)
@pytest.mark.parametrize("other", ["another", None])
def test_what_is_only_remarked(key: str, other: Any) -> None:
    base, head = pair(ONE, {**ONE, key: other})
    assert hard_differences(base, head) == []
    [found] = remarks(base, head)
    assert (found.key, found.base, found.head) == (key, f"one {key}", other or "not known")


@pytest.mark.parametrize("key", ["commit", "dirty", "started", "gpu_memory_bytes", "colour"])
def test_what_may_differ_and_is_not_said(key: str) -> None:
    base, head = pair(ONE, {**ONE, key: "another"})
    assert (hard_differences(base, head), remarks(base, head)) == ([], [])


@pytest.mark.parametrize(
    ("base", "head", "hard"),
    [
        ("580.159.04", "580.200", False),
        ("580.159.04", "580", False),
        ("580.159.04", "581.159.04", True),
        ("580.159.04", "58.0.159", True),
        ("580.159.04", None, True),
        (580, "580.1", True),
    ],
)
def test_another_driver_of_the_same_branch_is_only_remarked(base: Any, head: Any, hard: bool) -> None:
    runs = pair({"driver": base}, {"driver": head})
    assert keys(hard_differences(*runs)) == ["driver"] * hard
    [remarked] = remarks(*runs)
    assert (remarked.key, remarked.base) == ("driver version", str(base))


def test_no_variables_are_none() -> None:
    for base, head in ((None, {}), ({}, None)):
        assert hard_differences(*pair({"variables": base}, {"variables": head})) == []
    [found] = hard_differences(*pair({"variables": {}}, {"variables": {"OMP_NUM_THREADS": "1"}}))
    assert (found.key, found.base, json.loads(found.head)) == ("variables", "{}", {"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("value", [[], {}, {"a": [1]}, 10**400, float("nan"), True, "x" * 30_000, [["y" * 30_000]]])
def test_a_value_of_any_type_is_told_in_short(value: Any) -> None:
    [found] = hard_differences(*pair({"torch": "2.11.0"}, {"torch": value}))
    assert 0 < len(found.head) <= SHOWN


# Cases


@pytest.mark.parametrize(
    "key", sorted(set(Case.model_fields) - {"model", "optimizations", "weights", "guidance_scale"})
)
def test_each_key_of_a_case(key: str) -> None:
    other = record(case={key: "Another" if key == "scheduler" else 3})
    found = case_difference(record(), other, ())
    assert found is not None
    assert (found.key, found.head) == (key, "Another" if key == "scheduler" else "3")
    assert case_difference(record(), other, (key,)) is None
    assert case_difference(record(), other, ("method", "torch")) == found


@pytest.mark.parametrize(
    ("case", "key"),
    [
        ({"model": "sd"}, "model"),
        ({"optimizations": ["fp16", "vae_tiling"]}, "optimizations"),
        ({"weights": "pretrained"}, "weights"),
        ({"guidance_scale": 0}, "guidance_scale"),
    ],
)
def test_the_other_keys_of_a_case(case: Any, key: str) -> None:
    found = case_difference(record(), record(case=case), ())
    assert found is not None
    assert found.key == key


def test_the_same_record_has_no_difference() -> None:
    assert case_difference(record(), record(time={"workers": [{"rounds_s": [1], "median_s": 1}]}), ()) is None
    assert case_difference(own(), own(), ()) is None


def test_the_method_comes_first() -> None:
    found = case_difference(record(), record(method="estimated", case={"steps": 4}), ())
    assert found is not None
    assert (found.key, found.base, found.head) == ("method", "measured", "estimated")
    found = case_difference(record(), record(method="estimated", case={"steps": 4}), ("method",))
    assert found is not None
    assert found.key == "steps"


@pytest.mark.parametrize("changed", [{"build": "b.py:make"}, {"call": "b.py:use"}])
def test_renamed_functions_leave_a_test_s_own_pipeline_what_it_is(changed: dict[str, str]) -> None:
    renamed = Record.model_validate({**facts(id=own().id), "case": {**OWN, **changed}})
    assert case_difference(own(), renamed, ()) is None


def test_a_test_s_own_pipeline_has_a_method_too() -> None:
    found = case_difference(own(), own(method="estimated"), ())
    assert found is not None
    assert found.key == "method"


# Names of keys


@pytest.mark.parametrize("key", [*HARD, "method", "steps", "scheduler", "guidance_scale", "weights", "seed"])
def test_a_key_that_can_be_lifted(key: str) -> None:
    assert known_key(key, "--across") == key


@pytest.mark.parametrize(
    ("key", "near"), [("torhc", "torch"), ("Torch", "torch"), ("stepz", "steps"), ("power_limit", "power_limit_w")]
)
def test_a_key_that_is_none_is_one_line_with_the_nearest(key: str, near: str) -> None:
    with pytest.raises(UsageError, match=r"^--across: ") as caught:
        known_key(key, "--across")
    assert f"did you mean '{near}'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["", " ", "zzzz", "a\nb", "\x1b[31m", "commit", "host"])
def test_other_text_is_no_key(key: str) -> None:
    with pytest.raises(UsageError, match=r"^--across: unknown key ") as caught:
        known_key(key, "--across")
    assert str(caught.value).isprintable()
