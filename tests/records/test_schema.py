"""What a record may say: figures that cannot be true are refused, unknown keys are not."""

import contextlib
from typing import Any

import pytest
from pydantic import ValidationError

from pytest_vram.cases.case import Case, OwnCase
from pytest_vram.records.schema import Record, above_the_card

MIB = 1 << 20


def facts(**changes: Any) -> dict[str, Any]:
    """A measured record as JSON; `case` and `memory` in `changes` are added to its own."""
    case = {
        "model": "sdxl",
        "optimizations": ["fp16"],
        "height": 1024,
        "width": 1024,
        "batch_size": 1,
        "steps": 8,
        "guidance_scale": 5.0,
        "scheduler": "EulerDiscreteScheduler",
    }
    memory = {
        "weights_bytes": 6000 * MIB,
        "allocated_peak_bytes": 11800 * MIB,
        "reserved_peak_bytes": 15800 * MIB,
        "nvml_process_peak_bytes": 16500 * MIB,
        "need_bytes": 12100 * MIB,
        "need_tolerance_bytes": 64 * MIB,
        "context_bytes": 686 * MIB,
        "required_bytes": 12786 * MIB,
    }
    return {
        "id": "sdxl/fp16/1024x1024/b1",
        "status": "ok",
        "method": "measured",
        "time": {"median_s": 2.0, "workers": [{"rounds_s": [1.9, 2.0, 2.1], "median_s": 2.0}]},
        **changes,
        "case": {**case, **changes.get("case", {})},
        "memory": {**memory, **changes.get("memory", {})},
    }


def record(**changes: Any) -> Record:
    return Record.model_validate(facts(**changes))


FAILURE = {"phase": "denoise", "requested_bytes": 512 * MIB, "limit_bytes": 8192 * MIB, "message": "out of memory"}
BARE = dict.fromkeys(facts()["memory"])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"memory": {"allocated_peak_bytes": 15801 * MIB}}, "allocated_peak_bytes .* is above reserved_peak_bytes"),
        ({"memory": {"weights_bytes": 11801 * MIB}}, "weights_bytes .* is above allocated_peak_bytes"),
        (
            {"memory": {"nvml_process_peak_bytes": 15735 * MIB}},
            "reserved_peak_bytes .* is above nvml_process_peak_bytes",
        ),
        ({"memory": {"need_bytes": 15865 * MIB}}, "need_bytes .* is above reserved_peak_bytes .* its tolerance"),
        ({"memory": {"need_bytes": 15801 * MIB, "need_tolerance_bytes": None}}, "need_bytes .* is above"),
        (
            {"status": "oom", "failure": FAILURE, "memory": {"allocated_peak_bytes": 15801 * MIB}},
            "allocated_peak_bytes",
        ),
        ({"method": "estimated", "memory": {"allocated_peak_bytes": 15801 * MIB}}, "allocated_peak_bytes"),
        ({"time": {}}, "status ok with no rounds"),
        ({"status": "oom"}, "status oom with no failure"),
        ({"status": "error"}, "status error with no failure"),
        ({"status": "timeout"}, "status timeout with no failure"),
        ({"status": "skipped"}, "status skipped with no reason"),
        ({"status": "skipped", "reason": ""}, "status skipped with no reason"),
    ],
)
def test_what_cannot_be_true(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        record(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"memory": {"nvml_process_peak_bytes": 15736 * MIB}},
        {"memory": {"need_bytes": 15864 * MIB}},
        {"memory": {"weights_bytes": 11801 * MIB}, "case": {"optimizations": ["fp16", "model_offload"]}},
        {"memory": {"weights_bytes": 11801 * MIB}, "case": {"optimizations": ["fp16", "sequential_offload"]}},
        {"memory": {"weights_bytes": 11801 * MIB}, "case": {"optimizations": ["fp16", "text_encoders_dropped"]}},
        {"memory": {"weights_bytes": 11801 * MIB}, "status": "oom", "failure": FAILURE},
        {"memory": BARE},
        {"method": "estimated", "time": {}, "memory": {**BARE, "need_bytes": 1, "estimated_need_bytes": 1}},
        {"status": "skipped", "reason": "fp16 needs a GPU", "time": {}, "memory": BARE},
        {"status": "error", "failure": {"message": "CUDA error"}, "time": {}, "memory": BARE},
    ],
)
def test_what_can_be_true(changes: dict[str, Any]) -> None:
    assert record(**changes).status == changes.get("status", "ok")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("memory.weights_bytes", 0),
        ("memory.context_bytes", 0),
        ("memory.need_bytes", -1),
        ("memory.reserved_peak_bytes", 1 << 60),
        ("memory.allocated_peak_bytes", "lots"),
        ("memory.alloc_retries", -1),
        ("time.median_s", float("nan")),
        ("time.cold_s", 0.0),
        ("time.step_s", -0.1),
        ("time.images_per_s", float("inf")),
        ("time.workers", [{"rounds_s": [], "median_s": 1.0}]),
        ("time.workers", [{"rounds_s": [1.0, float("nan")], "median_s": 1.0}]),
        ("phases.denoise", {"time_s": float("nan")}),
        ("phases.denoise", {"allocated_peak_bytes": 0}),
        ("phases.sleep", {"time_s": 1.0}),
        ("effects.vae_tiling", "perhaps"),
        ("telemetry.rounds", [{"power_w": float("nan")}]),
        ("energy_j_per_image", 0),
        ("wall.total_s", -1.0),
        ("status", "fine"),
        ("method", "guessed"),
        ("id", ""),
        ("case.batch_size", 0),
        ("case.guidance_scale", float("nan")),
        ("exactness", {"against": "a", "max_abs_difference": 1.1, "mean_abs_difference": 0}),
        ("exactness", {"against": "a", "max_abs_difference": 1, "mean_abs_difference": float("nan")}),
        ("exactness", {"against": "a", "max_abs_difference": 1, "mean_abs_difference": 0, "psnr_db": -1.0}),
        ("exactness", {"against": "", "max_abs_difference": 1, "mean_abs_difference": 0}),
    ],
)
def test_a_figure_out_of_range_is_named(key: str, value: Any) -> None:
    table, _, name = key.partition(".")
    document = facts()
    document[table] = {**document.get(table, {}), name: value} if name else value
    with pytest.raises(ValidationError) as caught:
        Record.model_validate(document)
    named = [str(part) for part in caught.value.errors()[0]["loc"] if not str(part).startswith("kind:")]
    assert ".".join(named).startswith(key)


@pytest.mark.parametrize("key", ["id", "case", "status", "method"])
def test_a_record_needs(key: str) -> None:
    document = facts()
    del document[key]
    with pytest.raises(ValidationError, match=key):
        Record.model_validate(document)


def test_unknown_keys_are_ignored() -> None:
    newer = facts(case={"colour": "red"}, memory={"colour_bytes": 3}, colour="red")
    assert Record.model_validate(newer) == record()


def test_a_record_is_the_same_after_json() -> None:
    full = record(
        phases={"denoise": {"time_s": 1.5, "allocated_peak_bytes": 9000 * MIB}, "decode": {"time_s": 0.0}},
        telemetry={"rounds": [{"sm_clock_mhz": 1980, "temperature_c": -1, "power_w": 0.0, "throttle": ["power"]}]},
        effects={"vae_tiling": "no_effect"},
        unavailable={"memory.nvml_device_peak_bytes": "NVML: not supported"},
        wall={"total_s": 20.0, "load_s": 2.0},
    )
    assert Record.model_validate_json(full.model_dump_json()) == full


OWN = {"model": "tests/test_app.py", "test": "test_painter", "build": "app.py:build", "call": "app.py:paint"}


def own(**changes: Any) -> Record:
    """The record of somebody's own pipeline."""
    return Record.model_validate({**facts(id="tests/test_app.py::test_painter", **changes), "case": OWN})


def test_a_case_is_of_a_sweep_or_of_ones_own() -> None:
    assert isinstance(record().case, Case)
    assert own().case == OwnCase(**OWN)
    assert own().case.id == own().id
    for found in (own(), record()):
        assert Record.model_validate_json(found.model_dump_json()) == found
        assert Record.model_validate(found.model_dump()) == found


@pytest.mark.parametrize("key", OWN)
def test_a_case_of_ones_own_needs(key: str) -> None:
    case = {name: value for name, value in OWN.items() if name != key}
    with pytest.raises(ValidationError) as caught:
        Record.model_validate({**facts(), "case": case})
    missing = {error["loc"][-1] for error in caught.value.errors()}
    assert missing == {key} if key != "build" else missing, "with no `build` it is one of a sweep"


def test_a_pipeline_of_ones_own_may_offload_its_weights() -> None:
    assert own(memory={"weights_bytes": 11801 * MIB}).status == "ok"


@pytest.mark.parametrize(
    ("optimizations", "above"), [(["fp16"], 64), (["fp16", "expandable_segments"], 106), (["fp16", "vae_tiling"], 64)]
)
def test_with_expandable_segments_a_cap_may_be_above_what_is_reserved(optimizations: list[str], above: int) -> None:
    for mib, fine in ((above, True), (above + 1, False)):
        with contextlib.nullcontext() if fine else pytest.raises(ValidationError, match="is above reserved_peak_bytes"):
            record(memory={"need_bytes": (15800 + mib) * MIB}, case={"optimizations": optimizations})


# 4 roundings, each of half the distance from 1 to the next number of the dtype; for fp32 to that of TF32
@pytest.mark.parametrize(
    ("optimizations", "mean", "exact"),
    [
        (["fp16", "vae_tiling"], 2**-9, True),
        (["fp16", "vae_tiling"], 2**-9 + 1e-6, False),
        (["fp32", "vae_slicing"], 2**-9, True),
        (["fp32", "vae_slicing"], 2**-9 + 1e-6, False),
        (["bf16", "channels_last"], 2**-6, True),
        (["bf16", "channels_last"], 2**-6 + 1e-6, False),
    ],
)
def test_exact_is_what_rounding_in_the_dtype_explains(optimizations: list[str], mean: float, exact: bool) -> None:
    exactness = {"against": "x", "max_abs_difference": 1.0, "mean_abs_difference": mean, "psnr_db": 30.0}
    found = record(exactness=exactness, case={"optimizations": optimizations})
    assert found.exact is exact
    document = found.model_dump(mode="json")
    assert document["exact"] is exact
    assert Record.model_validate({**document, "exact": not exact}).exact is exact, "judged where it is read"


@pytest.mark.parametrize(
    ("flags", "difference", "idle"),
    [
        (["tf32"], None, ("tf32",)),  # not compared
        (["tf32"], 0.0, ("tf32",)),
        (["tf32"], 0.04, ()),
        (["tf32", "compile"], 0.04, ("tf32",)),  # the other one's, maybe
    ],
)
def test_a_flag_alone_that_changes_the_image_has_an_effect(
    flags: list[str], difference: float | None, idle: tuple[str, ...]
) -> None:
    apart = {"claimed": False, "against": "x", "mean_abs_difference": difference, "max_abs_difference": difference}
    found = record(
        effects={"bf16": "applied", "tf32": "no_effect"},
        exactness=None if difference is None else {**apart, "psnr_db": 44.0 if difference else None},
        case={"optimizations": ["bf16", *flags]},
    )
    assert found.no_effect == idle


def test_of_flags_that_claim_nothing_the_difference_is_information() -> None:
    apart = {"against": "x", "max_abs_difference": 0.9, "mean_abs_difference": 0.5, "psnr_db": 6.0}
    assert record(exactness={**apart, "claimed": False}).exact is None
    assert record(exactness=apart).exact is False


def test_what_was_not_compared_is_neither_exact_nor_not() -> None:
    assert record().exact is None
    assert record().model_dump(mode="json")["exact"] is None


def test_above_the_card() -> None:
    assert above_the_card(record(), 16500 * MIB) is None
    problem = above_the_card(record(), 16500 * MIB - 1)
    assert problem == f"nvml_process_peak_bytes {16500 * MIB} is more than the GPU has ({16500 * MIB - 1})"


def test_host_memory_and_estimates_may_be_more_than_the_card_has() -> None:
    memory = {"host_peak_bytes": 1 << 40, "estimated_need_bytes": 1 << 40}
    offloaded = {"optimizations": ["fp16", "model_offload"]}
    assert above_the_card(record(memory=memory), 16500 * MIB) is None
    assert above_the_card(record(memory={"weights_bytes": 1 << 40}, case=offloaded), 16500 * MIB) is None
