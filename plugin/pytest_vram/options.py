"""pytest's options of this package: declared, and read as one object."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_vram.against import BaseOptions
    from pytest_vram.measure.machine import Device
    from pytest_vram.planning import Options


def declare(parser: pytest.Parser) -> None:
    """Add the options to those of pytest."""
    group = parser.getgroup("vram", "what diffusion models cost on a GPU (pytest-vram)")
    add = group.addoption
    add(
        "--vram-device",
        dest="vram_device",  # a conftest may give it a shorter name
        choices=("meta", "cpu", "cuda"),
        default="meta",
        help="meta estimates with no GPU (default); cuda measures; cpu really runs small models",
    )
    add("--vram-matrix", metavar="FILE", help="the sweeps; default: matrix.toml beside the test")
    add("--vram-sweep", metavar="NAME", default="default", help="the sweep of the matrix; default: default")
    add("--vram-models", metavar="A,B", help="these models, in place of the sweep's")
    add("--vram-optimizations", metavar="A,B+C", help="these sets of optimizations, such as fp16,fp16+vae_tiling")
    add("--vram-resolutions", metavar="N,WxH", help="these resolutions: 512, 1024x768 (width x height), native")
    add("--vram-frames", metavar="N,M", help="these numbers of frames, of the models that make videos")
    add("--vram-batch-sizes", metavar="N,M", help="these batch sizes")
    add("--vram-steps", metavar="N", help="denoising steps of every case")
    add("--vram-rounds", metavar="N", help="rounds of every case; default: 5 to 30, from a pilot call")
    add("--vram-workers", metavar="N", default="1", help="fresh workers a case is timed in; default: 1")
    add(
        "--vram-weights",
        choices=("random", "pretrained"),
        default="random",
        help="random (default: no download, the same memory and time) or pretrained (hub id or folder)",
    )
    add("--vram-no-need", action="store_true", help="do not search the need: quicker, and no required memory")
    add("--vram-no-difference", action="store_true", help="do not compare with the image of the dtype alone: quicker")
    add("--vram-limit", metavar="SIZE", help="the memory each case may have, context included, such as 8GiB")
    add("--vram-no-estimate", action="store_true", help="measure without an estimate beside each record")
    add("--vram-leak-check", metavar="N", help="call each case N more times in one process: does its memory grow?")
    add("--vram-timeout", metavar="SECONDS", help="for one worker of a case; default: from its estimate, 600 or more")
    add("--vram-results", metavar="DIR", default="results", help="where run files go; default: results")
    add("--vram-shard", metavar="K/N", help="every N-th case from the K-th on; `pytest-vram merge` joins the N runs")
    add("--vram-resume", action="store_true", help="go on with the newest unfinished run")
    add("--vram-compare", metavar="BASE", help="exit 1 where this run is worse: a file, folder, commit, or latest")
    add("--vram-base-checkout", metavar="DIR", help="the base's checkout, to measure again what looks slower")
    add("--vram-across", metavar="KEY,KEY", help="compare although these differ, such as torch or steps")
    add("--vram-strict", action="store_true", help="with --vram-compare: ambiguous fails too")
    add("--vram-save-images", metavar="DIR", help="write the images of each case's last round")
    add("--vram-allow-shared", action="store_true", help="measure although other processes use the GPU")
    add("--vram-name-host", action="store_true", help="write host name and GPU uuid as they are, not hashed")


def read(config: pytest.Config) -> Options:
    """The command line as one object; raises UsageError of this package."""
    from pytest_vram.cases.case import parse_bytes
    from pytest_vram.cases.shard import Shard
    from pytest_vram.cases.sweep import Overrides
    from pytest_vram.errors import UsageError
    from pytest_vram.measure.measurement import Settings
    from pytest_vram.planning import Options

    def text(name: str) -> str | None:
        value: str | None = config.getoption(f"--vram-{name}")
        return value

    def names(name: str) -> tuple[str, ...] | None:
        value = text(name)
        if value is None:
            return None
        found = tuple(part.strip() for part in value.split(",") if part.strip())
        if not found:
            raise UsageError(f"--vram-{name}: is empty; name one or more, or leave it out")
        return found

    device: Device = config.getoption("--vram-device")
    needless = [f"--vram-{name}" for name in ("rounds", "save-images", "leak-check") if device == "meta" and text(name)]
    if needless:
        raise UsageError(f"{needless[0]}: nothing is run for an estimate; give --gpu, or leave it out")
    batches = names("batch-sizes")
    limit = text("limit")
    matrix = text("matrix")
    images = text("save-images")
    shard = text("shard")
    return Options(
        device=device,
        matrix=Path(matrix) if matrix else None,
        sweep=str(text("sweep")),
        overrides=Overrides(
            models=names("models"),
            optimizations=names("optimizations"),
            resolutions=names("resolutions"),
            frames=names("frames"),
            batch_sizes=None if batches is None else tuple(_whole(n, "--vram-batch-sizes") for n in batches),
            steps=_whole(text("steps"), "--vram-steps"),
        ),
        weights=config.getoption("--vram-weights"),
        limit_bytes=None if limit is None else parse_bytes(limit, "--vram-limit"),
        settings=Settings(
            rounds=_whole(text("rounds"), "--vram-rounds"),
            workers=_whole(text("workers"), "--vram-workers") or 1,
            timeout_s=_whole(text("timeout"), "--vram-timeout"),
            save_images=str(Path(images).absolute()) if images else None,
            need=not config.getoption("--vram-no-need"),
            difference=not config.getoption("--vram-no-difference"),
            leak_calls=_leak_calls(text("leak-check")),
        ),
        results=Path(str(text("results"))),
        shard=None if shard is None else Shard.parse(shard),
        resume=config.getoption("--vram-resume"),
        estimate=not config.getoption("--vram-no-estimate"),
        base=_base_options(config, names("across") or ()),
        tests=tuple(_readable_argument(argument, config) for argument in config.args),
        selection=_selection(config),
        allow_shared=config.getoption("--vram-allow-shared"),
        name_host=config.getoption("--vram-name-host"),
    )


def _base_options(config: pytest.Config, across: tuple[str, ...]) -> BaseOptions | None:
    from pytest_vram.against import BaseOptions
    from pytest_vram.compare.keys import known_key
    from pytest_vram.errors import UsageError

    name, checkout = config.getoption("--vram-compare"), config.getoption("--vram-base-checkout")
    if not name:
        given = {"base-checkout": checkout, "across": across, "strict": config.getoption("--vram-strict")}
        needless = next((option for option, value in given.items() if value), None)
        if needless and name is None:  # an empty one turns off what pytest.ini asks for
            raise UsageError(f"--vram-{needless}: says how to compare; give --vram-compare too, or leave it out")
        return None
    return BaseOptions(
        name=name,
        checkout=Path(checkout) if checkout else None,
        across=tuple(known_key(key, "--vram-across") for key in across),
        strict=config.getoption("--vram-strict"),
    )


def _selection(config: pytest.Config) -> dict[str, Any]:
    """pytest's options that leave tests out, where they are given."""
    names = ("keyword", "markexpr", "deselect", "ignore", "ignore_glob", "lf")
    return {name: value for name in names if (value := getattr(config.option, name, None))}


def _readable_argument(argument: str, config: pytest.Config) -> str:
    """A path or node id of the command line, as seen from the rootdir."""
    path, *rest = argument.split("::", 1)
    absolute = (config.invocation_params.dir / path).resolve()
    inside = absolute.is_relative_to(config.rootpath)
    return "::".join([(absolute.relative_to(config.rootpath) if inside else absolute).as_posix(), *rest])


def _leak_calls(text: str | None) -> int | None:
    from pytest_vram.errors import UsageError
    from pytest_vram.measure.drift import LEAST_CALLS, MOST_CALLS

    calls: int | None = _whole(text, "--vram-leak-check")
    if calls is not None and not LEAST_CALLS <= calls <= MOST_CALLS:
        raise UsageError(
            f"--vram-leak-check: {calls} calls say nothing; give {LEAST_CALLS} to {MOST_CALLS}, such as 20"
        )
    return calls


def _whole(text: str | None, option: str) -> Any:
    from pytest_vram.errors import UsageError

    if text is None:
        return None
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise UsageError(f"{option}: {text!r} is not a whole number of 1 or more")
    return int(text)
