"""What is said of machines whose memory means something else."""

from typing import Any

import pytest

from pytest_vram.records.caveats import SPILLS, UNIFIED, caveats


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, []),  # of a run before it was recorded
        ({"unified_memory": False, "spills": None}, []),
        ({"unified_memory": True}, [UNIFIED]),
        ({"unified_memory": "yes"}, []),  # a stranger's file
        ({"spills": "WDDM"}, [SPILLS]),
        ({"unified_memory": True, "spills": "WSL"}, [UNIFIED, SPILLS]),
    ],
)
def test_what_is_said(environment: dict[str, Any], said: list[str]) -> None:
    assert list(caveats(environment)) == said
