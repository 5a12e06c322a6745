"""Warnings are errors here, as they are not in bench/; those that other libraries make for themselves are not ours."""

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from pytest_vram.cases.models import Model, read_model
from tests.warm import warm_forkserver

HERE = Path(__file__).parent
# The same few examples each time; --hypothesis-profile=thorough looks for new ones, for as long as that takes.
slow_is_fine = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
settings.register_profile(
    "quick", max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=slow_is_fine
)
settings.register_profile(
    "thorough", max_examples=5000, deadline=None, database=None, suppress_health_check=slow_is_fine
)
settings.load_profile("quick")

for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
    del os.environ[name]  # what the tests start is no worker of theirs
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # a hundred sessions would compile the plugin anew, half a second each


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None):  # those that run the tests side by side share one
        os.environ[warm_forkserver.SOCKET] = warm_forkserver.environ()[warm_forkserver.SOCKET]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Building large networks, if only on the meta device, leaves the process with tens of GB of address space in pieces
    # so large that it may not be forked any more: those tests come last. First come those that start pytest: they take
    # longest.
    last = {HERE / "pipelines" / name for name in ("test_architectures.py", "test_calls.py", "test_video_calls.py")}
    items.sort(key=lambda item: (item.path in last, item.path.parent != HERE))
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("error", "ignore:::diffusers", "ignore:::transformers"))


@pytest.fixture(scope="session")
def tiny() -> Model:
    """A Stable Diffusion that a CPU runs in milliseconds."""
    return read_model(HERE / "models" / "tiny-sd.toml")


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, tiny: Model) -> Path:
    """The tiny pipeline saved as trained weights are, tokenizer and all.

    Made once and before any `pytester`, which forgets the modules that are imported after it was set up.
    """
    import torch

    from pytest_vram.pipelines.build import random_pipeline

    folder = tmp_path_factory.mktemp("saved") / "tiny-trained"
    pipe = random_pipeline(tiny, torch.float32, "cpu")
    pipe.register_modules(tokenizer=clip_tokenizer())
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def clip_tokenizer() -> Any:
    """A CLIP tokenizer that knows single letters."""
    import transformers

    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.CLIPTokenizer(
            vocab={word: number for number, word in enumerate(words)}, merges=[], model_max_length=77
        )
