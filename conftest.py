"""This repository's own short name for the GPU, and the plugin where it is not installed."""

import pytest

pytest_plugins = ["pytest_vram.plugin"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--gpu",
        action="store_const",
        const="cuda",
        dest="vram_device",
        default="meta",
        help="measure on the GPU: short for --vram-device cuda",
    )
