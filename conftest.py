"""This repository's own short name for the GPU, and the plugin where it is not installed; tests run side by side."""

import os

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


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A plain `pytest` runs the tests on as many processes as there are CPUs, at most four, each file on one of them.
    What is named runs in this one, as do measurements."""
    plain = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not hasattr(config, "workerinput")
    plain = plain and not (config.option.usepdb or config.option.trace)
    if plain and config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None:
        config.option.numprocesses = min(4, os.cpu_count() or 1)
        config.option.dist = "loadfile"
        config.option.loadscopereorder = False  # those that come last do
