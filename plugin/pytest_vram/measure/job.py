"""What a worker must know of what it measures."""

import os
import sys
from collections.abc import Mapping

from pytest_vram.cases.case import Case, OwnCase
from pytest_vram.cases.models import Model
from pytest_vram.measure.channel import Message
from pytest_vram.measure.forkserver import ALLOCATOR_VARIABLES


def job_of(case: Case, model: Model) -> Message:
    """A case of a sweep."""
    return {
        "id": case.id,
        "case": case.model_dump(mode="json"),
        "model": model.model_dump(mode="json", by_alias=True),
    }


def own_job(case: OwnCase, build: dict[str, str], call: dict[str, str], environ_before: Mapping[str, str]) -> Message:
    """A test's own pipeline, by the functions that build and call it.

    It runs as the test would: same `sys.path`, working folder, and environment where that differs from
    `environ_before`, with which workers start; and with what the user has set for PyTorch's allocator.
    """
    environ = {
        name: value
        for name, value in os.environ.items()
        if environ_before.get(name) != value or name in ALLOCATOR_VARIABLES
    }
    own = {"build": build, "call": call, "sys_path": list(sys.path), "folder": os.getcwd()}
    return {"id": case.id, "environ": environ, "own": own}
