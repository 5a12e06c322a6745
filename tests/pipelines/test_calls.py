"""One of each pipeline that makes images, called with no data; a file of its own, so that processes share the work."""

import pytest

from pytest_vram.cases.models import Model
from tests.pipelines.calls import CALLED, check


@pytest.mark.parametrize(
    "model", [model for model in CALLED.values() if model.native.frames is None], ids=lambda model: model.name
)
def test_an_estimate_goes_through_all_phases_and_makes_the_size_asked_for(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(model, monkeypatch)
