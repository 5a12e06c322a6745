"""The leak check: what counts as growth, and what the record says of it."""

from collections.abc import Sequence
from typing import Any

import pytest

from pytest_vram.errors import UsageError
from pytest_vram.measure import measurement
from pytest_vram.measure.drift import drift_of, growth, held, readings
from pytest_vram.measure.measurement import CaseInterrupted
from pytest_vram.options import _leak_calls
from pytest_vram.records.resuming import is_done
from pytest_vram.records.schema import CHECK_INTERRUPTED, Drift, Record
from pytest_vram.report.frame import frame
from pytest_vram.report.summary import drift as said
from pytest_vram.report.summary import line, properties, summary
from tests.measure.tasks import MIB
from tests.measure.test_measurement import Stage, card, cpu, cuda, server
from tests.records.test_schema import record
from tests.report.test_render import a_report, a_run, markdown

__all__ = ["card", "cpu", "cuda", "server"]  # fixtures
NOISY = [6.4409, 10.2472, 6.3317, 5.1773, 6.5391, 15.1567, 12.8895, 13.8159, 24.9966, 27.6669, 32.7323, 28.4301]


@pytest.mark.parametrize(
    ("values", "slope", "low", "high"),
    [  # scipy.stats.theilslopes of scipy 1.17.1; its interval of tied values is a little narrower
        ([0, 1, 2, 3], 1.0, 1.0, 1.0),
        ([5, 5, 5, 5, 5], 0.0, 0.0, 0.0),
        ([10, 8, 9, 7, 6, 5], -1.0, -2.0, -0.5),
        (NOISY, 2.476861111111111, 1.227375, 3.51512),
    ],
)
def test_the_slope_and_its_interval(values: Sequence[float], slope: float, low: float, high: float) -> None:
    assert growth(values) == pytest.approx((slope, low, high))


STEADY = [1000 * MIB] * 21


@pytest.mark.parametrize(
    ("kind", "values", "leaks"),
    [
        ("allocated", STEADY, []),
        ("allocated", [n * 512 for n in range(21)], ["allocated"]),
        ("allocated", [n // 3 * MIB for n in range(21)], ["allocated"]),
        ("allocated", [0] * 15 + [MIB] * 6, []),
        ("allocated", [MIB * (n % 2) for n in range(21)], []),
        ("allocated", [MIB * (21 - n) for n in range(21)], []),
        ("allocated", [0, 1, 2, 3], ["allocated"]),
        ("reserved", [2 * MIB * (n > 4) for n in range(21)], []),
        ("reserved", [2 * MIB * n for n in range(21)], ["reserved"]),
        ("tensors", [1000 + n for n in range(4)], ["tensors"]),
        ("host", [n * MIB for n in range(21)], ["host"]),
        ("host", [n * 250_000 for n in range(21)], []),
        ("host", [n * MIB for n in range(5)], []),
        ("host", [5 * MIB * (n > 10) for n in range(21)], []),
    ],
)
def test_what_grows_for_certain(kind: str, values: list[int], leaks: list[str]) -> None:
    assert drift_of({"host": [0] * len(values), kind: values}).leaks == leaks


def test_of_many_readings_some_are_compared_and_the_growth_is_that_of_one_call() -> None:
    assert growth([5 * n for n in range(10_001)]) == (5, 5, 5)
    assert growth([n + 3 * (n % 2) for n in range(1001)])[0] == pytest.approx(1, abs=0.01)


def test_readings_are_of_one_process_warmed_up() -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1

    found = readings(call, 5, 0)
    assert calls == 7
    assert {name: len(values) for name, values in found.items()} == {"tensors": 6, "host": 6}


def test_live_tensors_and_host_memory_are_counted() -> None:
    import torch

    before = held(0)
    kept = [torch.ones(1 << 22) for _ in range(3)]
    after = held(0)
    assert after["tensors"] - before["tensors"] == len(kept)
    assert after["host"] - before["host"] > 40 * MIB
    cycle: list[Any] = [torch.ones(1)]
    cycle.append(cycle)
    del cycle
    assert held(0)["tensors"] == after["tensors"], "what Python can collect is no leak"


# A case


def checked(stage: Stage, **script: Any) -> Record:
    return stage.measure(settings={"leak_calls": 5}, **script)


def test_one_more_worker_calls_again_and_nothing_of_the_timing_changes(cuda: Stage) -> None:
    record = checked(cuda, grows={"allocated": 3 * MIB})
    assert [job.get("leak_calls") for job in cuda.jobs] == [None, 5]
    assert record.drift == Drift(
        calls=5,
        allocated_bytes_per_call=3 * MIB,
        reserved_bytes_per_call=0,
        host_bytes_per_call=0,
        tensors_per_call=0,
        leaks=["allocated"],
    )
    plain = cuda.measure()
    assert (record.time, record.memory) == (plain.time, plain.memory)
    assert plain.drift is None
    assert not [key for key in plain.unavailable if key.startswith("drift")]


def test_with_a_limit_it_runs_under_the_limit(cuda: Stage) -> None:
    cuda.measure(settings={"leak_calls": 3}, limit_mib=1000)
    caps = [channel.told[1]["cap_bytes"] for channel in cuda.starter.channels]
    assert caps[0] == caps[-1] is not None


def test_on_the_cpu_there_is_no_allocator_to_ask(cpu: Stage) -> None:
    record = checked(cpu)
    assert record.drift is not None
    assert (record.drift.leaks, record.drift.allocated_bytes_per_call, record.drift.host_bytes_per_call) == (
        [],
        None,
        0,
    )
    assert {key for key in record.unavailable if key.startswith("drift")} == {
        "drift.allocated_bytes_per_call",
        "drift.reserved_bytes_per_call",
    }


@pytest.mark.parametrize(
    ("tires", "reason"),
    [
        ({"status": "oom", "message": "OutOfMemoryError: CUDA"}, "oom in the leak check: OutOfMemoryError: CUDA"),
        ({"status": "error", "message": "ValueError: no"}, "error in the leak check: ValueError: no"),
        ("die", "error in the leak check: the worker was killed by signal 9"),
    ],
)
def test_what_goes_wrong_leaves_the_measurement(cuda: Stage, tires: Any, reason: str) -> None:
    record = checked(cuda, tires=tires)
    assert (record.status, record.failure, record.drift) == ("ok", None, None)
    assert record.time.median_s == 1.0
    assert record.unavailable["drift"].startswith(reason)
    assert "no leak check: " in summary([record], {})


def test_its_calls_have_the_time_that_so_many_may_take(cuda: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurement, "later_timeout_s", lambda timeout_s, first_s: 0.25)
    monkeypatch.setattr(measurement, "LATER_FACTOR", 0.1)
    record = checked(cuda, tires="hang")  # five calls of a second each, as the rounds say
    assert record.unavailable["drift"].startswith("timeout in the leak check: no result within 0.75 s")


def test_a_case_that_failed_is_not_called_again(cuda: Stage) -> None:
    record = checked(cuda, failed={"status": "oom", "phase": "denoise", "message": "out of memory"})
    assert record.unavailable["drift"] == "the case did not complete"
    assert len(cuda.jobs) == 1


def test_ctrl_c_in_the_check_leaves_the_record_and_a_resumed_sweep_makes_it_again(cuda: Stage) -> None:
    cuda.starter.interrupted = 2
    with pytest.raises(CaseInterrupted) as caught:
        checked(cuda)
    assert caught.value.record.status == "ok"
    assert caught.value.record.unavailable["drift"] == CHECK_INTERRUPTED
    assert not is_done(caught.value.record)


# What people see

LEAKING = record(
    drift={"calls": 20, "allocated_bytes_per_call": 1.5 * MIB, "tensors_per_call": 2, "leaks": ["allocated"]}
)


def test_a_leak_is_said_wherever_findings_are() -> None:
    assert said(Drift(calls=20)) == "no leak in 20 calls"
    assert LEAKING.drift is not None
    assert said(LEAKING.drift) == "LEAKS, each call: allocated +1.5 MiB (20 calls)"
    assert said(Drift(calls=9, tensors_per_call=2.0, leaks=["tensors"])) == "LEAKS, each call: +2 tensors (9 calls)"
    assert "allocated +1.5 MiB" in " ".join(summary([LEAKING], {}).split())
    assert line(LEAKING).endswith("LEAKS, each call: allocated +1.5 MiB (20 calls)")
    assert properties(LEAKING)["vram.leaks"] == "allocated"
    assert properties(record(drift={"calls": 3}))["vram.leaks"] == "none"
    assert "leaks: allocated" in markdown(a_report(a_run(LEAKING)))
    (row,) = frame([a_run(LEAKING)]).to_dict("records")
    assert (row["leaks"], row["leak_check_calls"], row["allocated_bytes_per_call"]) == ("allocated", 20, 1.5 * MIB)


@pytest.mark.parametrize("text", ["0", "1", "2", "-3", "x", "1.5", "10001", "9" * 12])
def test_too_few_calls_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--vram-leak-check: "):
        _leak_calls(text)


def test_three_calls_are_enough() -> None:
    assert (_leak_calls(None), _leak_calls("3")) == (None, 3)
