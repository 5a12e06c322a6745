"""What a worker must know of what it measures."""

import sys

from pytest_vram.cases.case import Case, OwnCase
from pytest_vram.cases.models import Model
from pytest_vram.measure.channel import Message


def job_of(case: Case, model: Model) -> Message:
    """A case of a sweep."""
    return {
        "id": case.id,
        "case": case.model_dump(mode="json"),
        "model": model.model_dump(mode="json", by_alias=True),
    }


def own_job(case: OwnCase, build: dict[str, str], call: dict[str, str]) -> Message:
    """A test's own pipeline, by the functions that build and call it."""
    return {"id": case.id, "own": {"build": build, "call": call, "sys_path": list(sys.path)}}
