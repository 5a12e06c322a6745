"""Energy of an image, from counters that are played."""

from typing import Any

import pytest

from pytest_vram.measure.energy import joules_per_round
from pytest_vram.measure.sampling import Batch

LIMIT_W = 700.0


def batch(first: int, end: int, seconds: float, began_mj: int | None, ended_mj: int | None) -> Batch:
    return Batch(first, 100.0, began_mj, end, seconds, ended_mj)


CLEAN = batch(0, 10, 4.0, 1_000_000, 2_600_000)  # 1600 J, 400 W


def test_joules_of_a_round() -> None:
    assert joules_per_round([[CLEAN]], set(), LIMIT_W) == (160.0, "")


def test_all_gpus_of_a_case_count() -> None:
    assert joules_per_round([[CLEAN], [batch(0, 10, 4.0, 5_000, 405_000)]], set(), LIMIT_W) == (200.0, "")


def test_the_longest_batch_with_no_throttled_round() -> None:
    second, third = batch(10, 15, 2.5, 3_000_000, 3_500_000), batch(15, 17, 2.1, 3_500_000, 3_600_000)
    assert joules_per_round([[CLEAN, second, third]], {4}, LIMIT_W) == (100.0, "")
    assert joules_per_round([[CLEAN, second, third]], {4, 12}, LIMIT_W) == (50.0, "")


def test_a_batch_that_has_not_ended_is_none() -> None:
    begun = Batch(10, 110.0, 2_600_000)
    assert joules_per_round([[CLEAN, begun]], set(), LIMIT_W) == (160.0, "")
    assert joules_per_round([[begun]], set(), LIMIT_W) == (None, "it was not counted")
    assert joules_per_round([[]], set(), LIMIT_W) == (None, "it was not counted")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"seconds": 1.9}, "the rounds took 1.9 s, and the counter means little over less than 2 s"),
        ({"began_mj": None, "ended_mj": None}, "no energy counter"),
        ({"began_mj": None}, "did not tell the energy counter before and after"),
        ({"ended_mj": None}, "did not tell the energy counter before and after"),
        ({"ended_mj": 1_000_000}, "did not move"),
        ({"ended_mj": 900_000}, "did not move"),  # the driver was loaded anew
        ({"ended_mj": 1_000_000 + 4_300_000}, "the counter says 1075 W, and the power limit is 700 W"),
    ],
)
def test_a_counter_that_is_not_to_be_trusted(changes: dict[str, Any], why: str) -> None:
    joules, said = joules_per_round([[Batch(**{**vars(CLEAN), **changes})]], set(), LIMIT_W)
    assert joules is None
    assert why in said


def test_throttled_rounds_say_nothing_of_the_energy() -> None:
    assert joules_per_round([[CLEAN]], {9}, LIMIT_W) == (None, "the GPU was throttled meanwhile")
