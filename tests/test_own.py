"""Pipelines of one's own, measured on the CPU: what travels to a worker, what is refused, what the run file says."""

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from pytest_vram.cases.case import OwnCase
from pytest_vram.errors import UsageError
from pytest_vram.measure.job import own_job
from pytest_vram.measure.own import described, readable
from pytest_vram.records.files import read_run
from pytest_vram.records.schema import SEARCH_INTERRUPTED, Record, Run
from tests.test_plugin import WARM, command
from tests.warm import warm_forkserver

PLUGIN = Path(__file__).parents[1] / "plugin"
ON_THE_CPU = ["--vram-device=cpu", "--vram-rounds=3"]

PIPES = """
import torch

class Vae(torch.nn.Module):
    def decode(self, latents):
        return latents[:, :3]

class Painter:
    def __init__(self):
        self.unet, self.vae = torch.nn.Conv2d(4, 4, 3, padding=1), Vae()

def build_painter():
    return Painter()

def paint(painter):
    latents = torch.randn(1, 4, 8, 8)
    for _ in range(3):
        latents = painter.unet(latents)
    return painter.vae.decode(latents)
"""
BROKEN = """
def build():
    raise ValueError("no weights here")
"""
MINE = """
import pytest
import torch
import broken
from pipes import build_painter, paint

def build():
    return torch.nn.Linear(2, 2)

def call(linear):
    return linear(torch.ones(1, 2))

def bad_call(linear):
    raise RuntimeError("no such call")

def test_painter(vram):
    record = vram.measure(build_painter, paint)
    assert record.id == "test_mine.py::test_painter"

def test_two(vram):
    vram.measure(build, call)
    vram.measure(build_painter, paint)

@pytest.mark.parametrize("text", ["a", "b/c"])
def test_each(vram, text):
    vram.measure(build, call)

class TestClass:
    def test_method(self, vram):
        vram.measure(build, call)

def test_bad_build(vram):
    vram.measure(broken.build, call)

def test_bad_call(vram):
    vram.measure(build, bad_call)

def test_refused(vram):
    vram.measure(build, lambda linear: None)

KEPT = []

def leak(linear):
    KEPT.append(torch.ones(1 << 18))  # a mebibyte
    return call(linear)

def test_leak(vram):
    vram.measure(build, leak)

def tires(linear):
    KEPT.append(None)
    if len(KEPT) > 6:  # more calls than the rounds take
        raise RuntimeError("tired")
    return call(linear)

def test_tires(vram):
    vram.measure(build, tires)

@pytest.mark.vram(max_required="8GiB")
def test_marked(vram):
    vram.measure(build, call)
"""
WIDTH = "WIDTH = 2\n"
RELATIVE = """
import torch
from . import width
from .width import WIDTH

def build():
    assert width.WIDTH == WIDTH
    return torch.nn.Linear(WIDTH, 2)

def call(linear):
    return linear(torch.ones(1, 2))

def test_relative(vram):
    vram.measure(build, call)
"""
KIT = "import math\nmath.of_the_kit = math.tau\n"  # what a package does when it is imported
PARTS = """
import math
import torch

def build():
    assert math.of_the_kit
    return torch.nn.Identity()

def call(identity):
    return identity(torch.ones(1))
"""
KIT_TEST = """
from kit.parts import build, call

def test_kit(vram):
    vram.measure(build, call)
"""
FLAT = RELATIVE.replace("from . import width\nfrom .width", "from width").replace("width.WIDTH", "WIDTH")
FLAT = FLAT.replace("test_relative", "test_flat")


def run_pytest(folder: Path, *options: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    """pytest in a folder that is not on `sys.path` of itself, as the command `pytest` runs it."""
    python, *arguments = command(*options)
    inherited = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    path = os.pathsep.join([str(PLUGIN), str(WARM)])
    environ = {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **warm_forkserver.environ(), **environ}
    return subprocess.run([python, "-P", *arguments], cwd=folder, env=environ, capture_output=True, text=True)


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def run_file(folder: Path) -> Path:
    """The one run file that was written."""
    (path,) = (folder / "results").glob("*/*.json")
    return path


@dataclass
class Session:
    """What one pytest session has left: its run, its own report by test, and pytest-benchmark's file."""

    folder: Path
    text: str
    output: str
    reports: dict[str, tuple[str, str]]
    benchmarks: dict[str, list[float]]

    @property
    def run(self) -> Run:
        return Run.model_validate(json.loads(self.text)["vram"])

    def record(self, test: str) -> Record:
        """The record of a test, by the part of its id that is its own."""
        (found,) = [record for record in self.run.records if record.id.partition("::")[2] == test]
        return found


def session(folder: Path, *options: str) -> Session:
    # its temporary folder is elsewhere, so that this project's own path is not cut as one
    temporary = folder.parent / f"{folder.name}-tmp"
    temporary.mkdir(exist_ok=True)
    files = ["--junitxml=report.xml", "--benchmark-json=benchmark.json"]
    done = run_pytest(folder, *ON_THE_CPU, *files, *options, TMPDIR=str(temporary))
    reports = {}
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
        result = next((part for part in case if part.tag in ("failure", "error", "skipped")), None)
        text = "" if result is None else f"{result.get('message')}\n{result.text}"
        reports[str(case.get("name"))] = "passed" if result is None else result.tag, text
    document = (folder / "benchmark.json").read_text() or '{"benchmarks": []}'
    benchmarks = {found["name"]: found["stats"]["data"] for found in json.loads(document)["benchmarks"]}
    return Session(folder, run_file(folder).read_text(encoding="utf-8"), done.stdout, reports, benchmarks)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """One session over all of the tests above."""
    folder = tmp_path_factory.mktemp("own")
    package = {"inside/__init__.py": "", "inside/pkg/__init__.py": "", "inside/pkg/width.py": WIDTH}
    package["inside/pkg/test_relative.py"] = RELATIVE
    ignored = "\n".join(["broken.py", "results", "__pycache__", "*.xml", "*.json", ".benchmarks"])
    write(folder, {"pipes.py": PIPES, "broken.py": BROKEN, "test_mine.py": MINE, ".gitignore": ignored, **package})
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        identity = ["-c", "user.name=tests", "-c", "user.email=tests@example.invalid"]
        subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True)
    return session(folder, "--vram-leak-check=6")


def test_a_pipeline_with_unet_and_vae_is_measured_by_phase(measured: Session) -> None:
    assert measured.reports["test_painter"] == ("passed", "")
    record = measured.record("test_painter")
    assert record.case == OwnCase(
        model="test_mine.py", test="test_painter", build="pipes.py:build_painter", call="pipes.py:paint"
    )
    assert (record.status, record.method) == ("ok", "measured")
    assert set(record.phases) == {"load", "encode", "denoise", "decode"}
    assert record.time.denoiser_calls == 3
    assert record.memory.weights_bytes == (4 * 4 * 3 * 3 + 4) * 4
    assert len(record.time.workers[0].rounds_s) == 3


def test_another_object_is_measured_as_a_whole(measured: Session) -> None:
    record = measured.record("test_two")
    assert set(record.phases) == {"load", "call"}
    assert record.memory.weights_bytes == (2 * 2 + 2) * 4
    assert record.time.median_s == pytest.approx(record.phases["call"].time_s)


def test_every_measurement_has_the_id_of_its_test(measured: Session) -> None:
    assert [record.id for record in measured.run.records] == [
        "inside/pkg/test_relative.py::test_relative",
        "test_mine.py::test_painter",
        "test_mine.py::test_two",
        "test_mine.py::test_two#2",
        "test_mine.py::test_each[a]",
        "test_mine.py::test_each[b/c]",
        "test_mine.py::TestClass::test_method",
        "test_mine.py::test_bad_build",
        "test_mine.py::test_bad_call",
        "test_mine.py::test_leak",
        "test_mine.py::test_tires",
        "test_mine.py::test_marked",
    ]
    assert all(record.id == record.case.id for record in measured.run.records)
    assert not measured.run.complete, "one was refused"
    second = measured.record("test_two#2").case
    assert isinstance(second, OwnCase)
    assert (second.build, second.call) == ("pipes.py:build_painter", "pipes.py:paint")


def test_a_call_that_keeps_a_tensor_each_time_is_found(measured: Session) -> None:
    assert measured.reports["test_leak"] == ("passed", "")
    drift = measured.record("test_leak").drift
    assert drift is not None
    assert (drift.calls, drift.leaks, drift.tensors_per_call) == (6, ["tensors", "host"], 1)
    assert drift.host_bytes_per_call == pytest.approx(1 << 20, rel=0.1)
    assert drift.allocated_bytes_per_call is None
    assert "allocator statistics" in measured.record("test_leak").unavailable["drift.allocated_bytes_per_call"]
    assert re.search(r"LEAKS, each call: \+1 tensors, host \+(1|0\.9\d*|1\.0\d*) MiB\s+\(6\s+calls\)", measured.output)


@pytest.mark.parametrize("test", ["test_painter", "test_two", "TestClass::test_method", "test_relative"])
def test_a_call_that_keeps_nothing_does_not_leak(measured: Session, test: str) -> None:
    drift = measured.record(test).drift
    assert drift is not None
    assert (drift.calls, drift.leaks, drift.tensors_per_call) == (6, [], 0)


def test_a_leak_check_that_fails_leaves_the_measurement(measured: Session) -> None:
    record = measured.record("test_tires")
    assert measured.reports["test_tires"] == ("passed", "")
    assert (record.status, record.drift) == ("ok", None)
    assert record.time.median_s
    assert record.unavailable["drift"] == "error in the leak check: RuntimeError: tired"
    assert measured.record("test_bad_call").unavailable["drift"] == "the case did not complete"


def test_a_module_with_relative_imports_is_found_again(measured: Session) -> None:
    assert measured.reports["test_relative"] == ("passed", "")
    case = measured.record("test_relative").case
    assert isinstance(case, OwnCase)
    assert case.build == "inside/pkg/test_relative.py:build"


@pytest.mark.parametrize(
    ("test", "phase", "error", "line"),
    [
        ("test_bad_build", "load", "ValueError: no weights here", "in build"),
        ("test_bad_call", "call", "RuntimeError: no such call", "in bad_call"),
    ],
)
def test_what_raises_fails_its_test_and_is_kept(
    measured: Session, test: str, phase: str, error: str, line: str
) -> None:
    outcome, text = measured.reports[test]
    assert outcome == "failure"
    assert f"test_mine.py::{test}: error: {error}" in text
    record = measured.record(test)
    assert record.status == "error"
    assert record.failure is not None
    assert (record.failure.phase, record.failure.message) == (phase, error)
    assert record.failure.output_tail.splitlines()[-1] == error
    assert line in record.failure.output_tail
    assert record.failure.output_tail in text


def test_a_function_that_is_refused_fails_its_test(measured: Session) -> None:
    outcome, text = measured.reports["test_refused"]
    assert outcome == "failure"
    assert "vram.measure: call test_refused.<locals>.<lambda> is a lambda" in text


def test_a_limit_of_gpu_memory_says_nothing_on_the_cpu(measured: Session) -> None:
    outcome, text = measured.reports["test_marked"]
    assert outcome == "skipped"
    assert "max_required is about the memory of a GPU" in text
    assert measured.record("test_marked").status == "ok"


def test_no_path_of_this_machine_is_in_what_was_measured(measured: Session) -> None:
    for record in measured.run.records:
        if record.failure is None:
            assert str(measured.folder.parent) not in record.model_dump_json()
            assert sys.prefix not in record.model_dump_json()


def test_no_path_of_this_machine_is_in_the_file(measured: Session) -> None:
    assert str(measured.folder) not in measured.text
    assert str(PLUGIN) not in measured.text


def test_pytest_benchmark_gets_the_rounds_of_the_first_measurement(measured: Session) -> None:
    for test in ("test_painter", "test_two", "test_each[b/c]"):
        assert measured.benchmarks[test] == pytest.approx(measured.record(test).time.workers[0].rounds_s)
    assert "test_bad_call" not in measured.benchmarks


def test_the_summary_and_the_progress_name_every_measurement(measured: Session) -> None:
    assert "test_mine.py::test_two#2: ok" in measured.output
    assert "\n test_bad_build" in measured.output


def test_a_refusal_is_said_once(measured: Session) -> None:
    _, text = measured.reports["test_refused"]
    assert "During handling of the above exception" not in text


@pytest.fixture(scope="module")
def resumed(measured: Session) -> Session:
    """The same again with --vram-resume: the build is mended, and the search of one case was interrupted."""
    write(measured.folder, {"broken.py": "import torch\ndef build():\n    return torch.nn.Linear(2, 2)\n"})
    document = json.loads(measured.text)
    for record in document["vram"]["records"]:
        if record["id"].endswith("test_each[a]"):
            record["unavailable"]["memory.need_bytes"] = SEARCH_INTERRUPTED
    run_file(measured.folder).write_text(json.dumps(document), encoding="utf-8")
    return session(measured.folder, "--vram-resume", "--deselect=test_mine.py::test_refused")


def test_resume_measures_only_what_failed_or_was_interrupted(measured: Session, resumed: Session) -> None:
    before = {record.id: record for record in measured.run.records}
    after = {record.id: record for record in resumed.run.records}
    assert before.keys() == after.keys()
    again = {name.partition("::")[2] for name, record in after.items() if record != before[name]}
    assert again == {"test_each[a]", "test_bad_build", "test_bad_call"}
    assert resumed.record("test_bad_build").status == "ok"
    assert resumed.record("test_bad_call").status == "error"
    assert resumed.run.complete


@pytest.fixture(scope="module")
def by_importlib(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    """Records by test, with --import-mode=importlib: pytest leaves `sys.path` as it is."""
    folder = tmp_path_factory.mktemp("importlib")
    write(folder, {"pytest.ini": "[pytest]\naddopts = --import-mode=importlib\npythonpath = lib\n"})
    write(folder, {"alone/test_flat.py": FLAT, "lib/width.py": WIDTH})
    write(folder, {"inside/__init__.py": "", "inside/width.py": WIDTH, "inside/test_relative.py": RELATIVE})
    write(folder, {"alone/test_kit.py": KIT_TEST, "lib/kit/__init__.py": KIT, "lib/kit/parts.py": PARTS})
    run_pytest(folder, *ON_THE_CPU)
    return {record.id.partition("::")[2]: record for record in read_run(run_file(folder)).records}


def test_import_mode_importlib(by_importlib: dict[str, Record]) -> None:
    record = by_importlib["test_flat"]
    assert isinstance(record.case, OwnCase)
    assert (record.status, record.case.build) == ("ok", "alone/test_flat.py:build")


def test_relative_imports_with_import_mode_importlib(by_importlib: dict[str, Record]) -> None:
    assert by_importlib["test_relative"].status == "ok"


def test_a_package_is_set_up_before_its_module(by_importlib: dict[str, Record]) -> None:
    assert by_importlib["test_kit"].status == "ok"


def test_no_estimate_and_no_n(tmp_path: Path) -> None:
    write(tmp_path, {"test_it.py": "def test_it(vram):\n    vram.measure(test_it, test_it)\n"})
    estimated = run_pytest(tmp_path, "-rs")
    assert estimated.returncode == pytest.ExitCode.OK
    assert "a pipeline of your own is measured, not estimated: give --vram-device cuda" in estimated.stdout
    parallel = run_pytest(tmp_path, "-n", "1", "--vram-device=cpu")
    assert parallel.returncode == pytest.ExitCode.TESTS_FAILED
    assert "-n: pipelines are measured one at a time; leave -n out" in parallel.stdout
    assert not (tmp_path / "results").exists()


# Which functions travel


def top_level() -> None:
    pass


def renamed() -> None:
    pass


renamed.__qualname__ = "gone"


class Thing:
    def method(self) -> None:
        pass

    def __call__(self) -> None:
        pass


def closure() -> Callable[[], object]:
    held = object()

    def inner() -> object:
        return held

    return inner


def nested() -> Callable[[], None]:
    def inner() -> None:
        pass

    return inner


REFUSED: list[tuple[Any, str]] = [
    (lambda: None, "build <lambda> is a lambda;"),
    (closure(), "build closure.<locals>.inner is a closure: it holds held of the function around it;"),
    (nested(), "build nested.<locals>.inner is defined inside another function;"),
    (renamed, "build gone is not what tests.test_own calls gone;"),
    (Thing().method, "build is Thing.method, not a function;"),
    (Thing(), "build is Thing, not a function;"),
    (functools.partial(top_level), "build is partial, not a function;"),
    (print, "build is print, not a function;"),
    (None, "build is NoneType, not a function;"),
]


@pytest.mark.parametrize(("function", "problem"), REFUSED, ids=[problem for _, problem in REFUSED])
def test_what_a_worker_cannot_import_is_refused_in_one_line(function: Any, problem: str) -> None:
    with pytest.raises(UsageError) as caught:
        described(function, "build")
    message = str(caught.value)
    assert message.startswith(f"vram.measure: {problem}")
    assert "\n" not in message


def test_a_function_of_a_module_is_described_by_where_it_is() -> None:
    found = described(top_level, "call")
    assert found == {"file": __file__, "module": __name__, "name": "top_level"}
    here = Path(__file__)
    assert readable(found, here.parents[1]) == "tests/test_own.py:top_level"
    assert readable(found, here.parent / "records") == "test_own.py:top_level"


def decorated(function: Callable[[], None]) -> Callable[[], None]:
    @functools.wraps(function)
    def around() -> None:
        function()

    return around


@decorated
def with_a_decorator() -> None:
    pass


def test_a_decorated_function_travels() -> None:
    assert described(with_a_decorator, "call")["name"] == "with_a_decorator"


def test_a_class_may_build() -> None:
    assert described(Thing, "build")["name"] == "Thing"


def test_the_test_s_environment_and_folder_travel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = dict(os.environ)
    monkeypatch.setenv("MODEL_DIR", "somewhere")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.chdir(tmp_path)
    case = OwnCase(model="test_a.py", test="test_b", build="a.py:b", call="a.py:c")
    job = own_job(case, {}, {}, {**before, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})
    assert job["environ"] == {"MODEL_DIR": "somewhere", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert job["own"]["folder"] == str(tmp_path)


def test_a_marker_on_a_test_that_measures_nothing_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"test_it.py": 'import pytest\n@pytest.mark.vram(max_required="1GiB")\ndef test_it(): pass\n'})
    done = run_pytest(tmp_path)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "test_it.py::test_it: @pytest.mark.vram: the test measures nothing" in done.stderr
