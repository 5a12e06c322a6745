"""Warnings are errors here, as they are not in bench/; those that other libraries make for themselves are not ours."""

from pathlib import Path

import pytest

from pytest_vram.cases.models import Model, read_model

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("error", "ignore:::diffusers", "ignore:::transformers"))


@pytest.fixture(scope="session")
def tiny() -> Model:
    """A Stable Diffusion that a CPU runs in milliseconds."""
    return read_model(HERE / "models" / "tiny-sd.toml")
