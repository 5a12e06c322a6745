"""How long a worker may take: more for more work, and never less than a healthy one takes."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pytest_vram.cases.case import Case
from pytest_vram.measure.generation import MIN_ROUNDS
from pytest_vram.measure.timeout import FEWEST_ROUNDS, LEAST_S, later_timeout_s, timeout_s
from pytest_vram.measure.trace import OneDevice, Trace

# What simulate() gives for FLUX.1-dev in bf16 at 1024x1024, batch 1; bytes, and operations of a step or a call
FLUX = {
    "event": "done",
    "weights": 32178 << 20,
    "flops": {"encode": 4.858e12, "denoise": 74.38e12, "decode": 10.47e12},
}


def case_of(*optimizations: str, steps: int = 28) -> Case:
    return Case(
        model="flux1-dev",
        optimizations=("bf16", *optimizations),
        height=1024,
        width=1024,
        batch_size=1,
        steps=steps,
        guidance_scale=3.5,
        scheduler="FlowMatchEulerDiscreteScheduler",
    )


def test_a_large_case_has_longer_than_the_slowest_gpu_takes() -> None:
    call_s = (28 * 74.38 + 4.858 + 10.47) / 5  # at 5e12 a second
    expected = LEAST_S + (32178 << 20) / 50e6 + 7 * call_s
    assert timeout_s(case_of(), FLUX, None) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize(
    ("case", "rounds", "beside"),
    [
        (case_of(steps=50), None, case_of()),
        (case_of("sequential_offload"), None, case_of()),
        (case_of("group_offload_leaf_disk"), None, case_of("sequential_offload")),
        (case_of(), 30, case_of()),
    ],
    ids=["steps", "offload", "from disk", "rounds"],
)
def test_more_work_has_longer(case: Case, rounds: int | None, beside: Case) -> None:
    assert timeout_s(case, FLUX, rounds) > 1.5 * timeout_s(beside, FLUX, None)


@pytest.mark.parametrize("estimate", [{}, {"event": "failed", "message": "x"}, {"event": "timeout"}])
def test_without_an_estimate_it_is_the_least(estimate: dict[str, Any]) -> None:
    assert timeout_s(case_of(), estimate, None) == LEAST_S


def test_the_rounds_are_those_of_the_worker() -> None:
    assert FEWEST_ROUNDS == MIN_ROUNDS


@pytest.mark.parametrize(("first_s", "expected"), [(1.0, 130.0), (20.0, 320.0), (60.0, 600.0), (6000.0, 600.0)])
def test_what_is_known_to_be_quick_is_not_waited_for_as_long(first_s: float, expected: float) -> None:
    assert later_timeout_s(600.0, first_s) == expected


@pytest.mark.parametrize(
    ("call", "shapes", "multiplications"),
    [
        (F.linear, [(4, 8), (16, 8)], 4 * 16 * 8),
        (F.linear, [(4, 8), (16, 8), (16,)], 4 * 16 * 8),
        (torch.bmm, [(3, 4, 8), (3, 8, 5)], 3 * 4 * 5 * 8),
        (torch.baddbmm, [(3, 4, 5), (3, 4, 8), (3, 8, 5)], 3 * 4 * 5 * 8),
        (partial(F.conv2d, padding=1), [(1, 3, 8, 8), (5, 3, 3, 3)], 8 * 8 * 5 * 3 * 9),
        (partial(F.conv2d, padding=1, groups=2), [(1, 6, 8, 8), (4, 3, 3, 3)], 8 * 8 * 4 * 3 * 9),
        (partial(F.conv_transpose2d, stride=2), [(1, 3, 4, 4), (3, 5, 2, 2)], 4 * 4 * 3 * 5 * 4),
        (F.scaled_dot_product_attention, [(2, 3, 16, 4), (2, 3, 10, 4), (2, 3, 10, 4)], 2 * 3 * 16 * 10 * 4 * 2),
        (torch.add, [(4, 8), (4, 8)], 0),
    ],
    ids=["linear", "bias", "bmm", "baddbmm", "conv", "groups", "transposed", "attention", "none"],
)
def test_operations_are_counted_by_phase(call: Any, shapes: list[tuple[int, ...]], multiplications: int) -> None:
    tensors = [torch.empty(shape, device="meta") for shape in shapes]
    with torch.no_grad(), OneDevice() as one_device, Trace() as trace:
        one_device.compute = trace.compute
        trace.enter("denoise")
        call(*tensors)
    assert trace.flops == ({"denoise": 2 * multiplications} if multiplications else {})
