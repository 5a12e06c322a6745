"""What `pytest-vram init` writes into somebody's repository; it overwrites nothing."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from keyword import iskeyword
from pathlib import Path

from pytest_vram.errors import UsageError

SWEEP = '''\
"""Every case of matrix.toml, from prompt to pixels, each in a process of its own."""


def test_generation(vram_case):
    vram_case.run()
'''
PIPELINE = '''\
"""What our own pipeline costs; @pytest.mark.vram(max_required="8GiB") above a test makes it fail above that."""

{imports}


def test_pipeline(vram):
    vram.measure(build, call)
'''
CONFTEST = """\
def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_const", const="cuda", dest="vram_device", default="meta")
"""


@dataclass(frozen=True)
class Written:
    """One file: what was done, and what is left to do."""

    path: str
    done: str
    left: str = ""


def initialize(root: Path, build: str | None, call: str | None) -> Iterator[Written]:
    """Write what is missing under `root`; `build` and `call` read `module:function`.

    Raises:
        UsageError: bad references, or a folder that cannot be written.
    """
    if (build is None) != (call is None):
        raise UsageError("--build and --call go together: the one makes the pipeline, the other calls it")
    contents = {
        "bench/test_generation.py": SWEEP,
        "bench/matrix.toml": (files("pytest_vram") / "cases" / "matrix.toml").read_text(encoding="utf-8"),
    }
    if build and call:
        imports = [_import(build, "--build", "build"), _import(call, "--call", "call")]
        contents["bench/test_pipeline.py"] = PIPELINE.format(imports="\n".join(imports))
    try:
        (root / "bench").mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            yield _write(root, name, text)
        yield _conftest(root)
    except OSError as error:
        raise UsageError(f"init: {error.filename} cannot be written: {error.strerror}") from error


def _import(reference: str, option: str, name: str) -> str:
    """The line that imports `module:function` under this name."""
    module, _, function = reference.partition(":")
    if not all(part.isidentifier() and not iskeyword(part) for part in (*module.split("."), function)):
        raise UsageError(f"{option}: {reference!r} is not module:function, such as app.pipelines:build")
    return f"from {module} import {function}" + (f" as {name}" if function != name else "")


def _write(root: Path, name: str, text: str) -> Written:
    path = root / name
    if path.exists():
        return Written(name, "is there, left as it is")
    path.write_text(text, encoding="utf-8")
    return Written(name, "written")


def _conftest(root: Path) -> Written:
    """The root's conftest.py gets --gpu, unless it has options of its own: then the line is for a person to add."""
    path = root / "conftest.py"
    line = CONFTEST.splitlines()[1].strip()
    if not path.exists():
        path.write_text(CONFTEST, encoding="utf-8")
        return Written("conftest.py", "written")
    old = path.read_bytes()
    if re.search(rb"[\"']--gpu[\"']", old):
        left = "" if b"vram_device" in old else "its --gpu does something else: give --vram-device cuda"
        return Written("conftest.py", "has --gpu", left)
    if b"pytest_addoption" in old:
        return Written("conftest.py", "left as it is", f"add to its pytest_addoption: {line}")
    with path.open("a", encoding="ascii", newline="\r\n" if b"\r\n" in old else "\n") as file:
        file.write(("" if old.endswith(b"\n") or not old else "\n") + "\n\n" + CONFTEST)
    return Written("conftest.py", "--gpu added")
