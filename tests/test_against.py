"""`pytest --vram-compare` from the options to the exit code: on the CPU, in checkouts of one repository."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil
import pytest

from pytest_vram import against
from pytest_vram.against import Base, BaseOptions
from pytest_vram.compare.comparison import Change, Comparison, read_comparison
from pytest_vram.compare.timing import Again
from pytest_vram.errors import UsageError
from pytest_vram.measure.again import Checkout, NotMeasured
from pytest_vram.records.files import read_run
from pytest_vram.records.reading import ReadRun
from pytest_vram.records.schema import Record, Run
from pytest_vram.report.comparing import as_markdown
from tests.compare.test_comparing import ENVIRONMENT, timed
from tests.measure.test_environment import git
from tests.records.test_reading import put
from tests.test_own import write
from tests.test_plugin import WARM
from tests.warm import warm_forkserver

HERE = Path(__file__).parent
PLUGIN = HERE.parent / "plugin"
PATIENCE_S = 120.0
MIB = 1 << 20

# The clock that a worker reads is put forward, so that a call takes 10 s at once and exactly.
PIPES = """
import time

SLOW_S, HELD_MIB, BROKEN, STUCK = 10.0, 1, False, False
_real, _ahead_s = time.perf_counter, 0.0

def clock():
    return _real() + _ahead_s

def build():
    import torch
    time.perf_counter = clock
    return torch.nn.Linear(2, 2)

def take(linear, seconds):
    import torch
    global _ahead_s
    _ahead_s += seconds
    return linear(torch.ones(1, 2))

def slow(linear):
    if STUCK:
        time.sleep(600)
    return take(linear, SLOW_S)

def steady(linear):
    return take(linear, 10.0)

def holds(linear):
    began = _real()
    linear.held = b"1" * (HELD_MIB << 20)
    return take(linear, 10.0 - (_real() - began))  # filling memory takes its own time

def breaks(linear):
    if BROKEN:
        raise RuntimeError("broken in the head")
    return take(linear, 10.0)
"""
SLOWER = PIPES.replace("10.0, 1, False, False", "16.0, 401, True, False")
MEASURES = """
def test_{name}(vram):
    vram.measure(pipes.build, pipes.{call})
"""
TWICE = """
def test_twice(vram):
    vram.measure(pipes.build, pipes.steady)
    vram.measure(pipes.build, pipes.steady)
"""


def measuring(**calls: str) -> str:
    """A test file, by test: which function of the pipelines it calls."""
    return "".join(["import pipes\n", *(MEASURES.format(name=n, call=c) for n, c in calls.items()), TWICE])


SAME = {"slow": "slow", "steady": "steady", "holds": "holds", "breaks": "breaks"}
COMMON = {
    ".gitignore": "__pycache__\n.benchmarks\n",
    "app/pytest.ini": "[pytest]\naddopts = -p pytest_vram.plugin\n",
}
BASE = {**COMMON, "lib/pipes.py": PIPES, "app/test_app.py": measuring(**SAME, goes="steady")}
HEAD = {**COMMON, "lib/pipes.py": SLOWER, "app/test_app.py": measuring(**SAME, comes="steady")}


class Session:
    """One pytest session, which may still run, and what it leaves."""

    def __init__(self, folder: Path, results: Path, options: Sequence[str], environ: dict[str, str]) -> None:
        self.results, self.said = results, results.with_suffix(".txt")
        left_out = ("PYTEST_ADDOPTS", "GITHUB_STEP_SUMMARY")
        inherited = {name: value for name, value in os.environ.items() if name not in left_out}
        # of what is installed these two alone, here and where times are measured again: others take long to import
        warm = {**warm_forkserver.environ(), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        warm["PYTEST_PLUGINS"] += ",xdist.plugin,pytest_benchmark.plugin"
        path = os.pathsep.join([str(PLUGIN), str(WARM), str(folder.parent / "lib")])
        with self.said.open("wb") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", f"--vram-results={results}", *options],
                cwd=folder,
                env={**inherited, **warm, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environ},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                # a shell's background jobs ignore Ctrl-C, and what they start does too
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    @property
    def code(self) -> int:
        return self.process.wait(PATIENCE_S)

    @property
    def output(self) -> str:
        assert self.code in (0, 1, 2, 4)
        return self.said.read_text(encoding="utf-8")

    @property
    def one_line(self) -> str:
        """The output, without the breaks that a narrow terminal makes."""
        return " ".join(self.output.split())

    @property
    def comparison_path(self) -> Path:
        output = self.output  # it has ended then
        found = list(self.results.glob("*/comparisons/*.json"))
        assert len(found) == 1, output
        return found[0]

    @property
    def comparison(self) -> Comparison:
        return read_comparison(self.comparison_path)

    @property
    def run(self) -> Run:
        """The run that was compared."""
        return read_run(self.comparison_path.parents[1] / self.comparison_path.name)

    def again(self, side: str) -> dict[str, Run]:
        """The runs of a side that decided about times, by file name."""
        folder = self.comparison_path.with_suffix("") / side
        return {path.name: read_run(path) for path in sorted(folder.glob("cpu/*.json"))}

    @property
    def verdicts(self) -> dict[str, str]:
        return {case.id.partition("::test_")[2]: case.verdict for case in self.comparison.cases}

    def reason(self, test: str) -> str:
        (case,) = [case for case in self.comparison.cases if case.id.endswith(f"::test_{test}")]
        return case.reason

    def change(self, test: str, metric: str = "time.median_s") -> Change:
        (case,) = [case for case in self.comparison.cases if case.id.endswith(f"::test_{test}")]
        (change,) = [change for change in case.changes if change.metric == metric]
        return change


@dataclass(frozen=True)
class World:
    """The checkouts, and a finished run of the base with three workers."""

    folder: Path

    @property
    def base_run(self) -> Path:
        (path,) = (self.folder / "results" / "base" / "cpu").glob("*.json")
        return path

    @property
    def estimate(self) -> Path:
        """A finished run of estimates, of another project."""
        (path,) = (self.folder / "results" / "estimate" / "estimated").glob("*.json")
        return path

    def commit(self, checkout: str) -> str:
        return git(self.folder / checkout, "rev-parse", "HEAD")

    def start(self, folder: str, name: str, *options: str, **environ: str) -> Session:
        results = self.folder / "results" / name
        results.parent.mkdir(exist_ok=True)
        return Session(self.folder / folder, results, options, environ)

    def head(self, name: str, *options: str, **environ: str) -> Session:
        """pytest in the head, with its results in a folder of this name."""
        return self.start("head/app", name, "--vram-device=cpu", "--vram-rounds=3", *options, **environ)

    def stored(self, name: str, tests: str, *, workers: int = 3, **environment: Any) -> Path:
        """The base's run where `head` looks for it, with these tests alone, fewer workers, another environment."""
        document = json.loads(self.base_run.read_text(encoding="utf-8"))
        run = document["vram"]
        run["environment"] |= environment
        run["records"] = [record for record in run["records"] if record["case"]["test"][5:] in tests.split()]
        for record in run["records"]:
            del record["time"]["workers"][workers:]
        path = self.folder / "results" / name / "cpu" / self.base_run.name
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(document), encoding="utf-8")
        return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world").resolve()
    made = World(folder)
    base = folder / "base"
    write(base, BASE)
    git(base, "init", "-q")
    commit(base, "one")
    for name, files in {
        "head": HEAD,
        "elsewhere": {"app/new.txt": "another commit"},
        "broken": {"app/test_app.py": "import pipes, none_of_such_name\n"},
        "stuck": {"lib/pipes.py": PIPES.replace("False, False", "False, True")},
    }.items():
        git(folder, "clone", "-q", "base", name)
        write(folder / name, files)
        commit(folder / name, "two")
    models = {f"models/{path.name}": path.read_text() for path in (HERE / "models").glob("tiny-sd.toml")}
    test = "def test_generation(vram_case):\n    vram_case.run()\n"
    write(folder / "sweep", {"pytest.ini": COMMON["app/pytest.ini"], "test_it.py": test, **models})
    write(folder / "sweep", {"matrix.toml": (HERE / "matrix.toml").read_text()})
    measured = made.start("base/app", "base", "--vram-device=cpu", "--vram-rounds=3", "--vram-workers=3")
    estimated = made.start("sweep", "estimate", *ESTIMATES)
    assert measured.code == estimated.code == 0, measured.output + estimated.output
    return made


ESTIMATES = ["--vram-batch-sizes=1", "--vram-optimizations=fp32"]


def commit(folder: Path, message: str) -> None:
    git(folder, "add", ".")
    git(folder, "commit", "-qm", message)


# Measured again in both checkouts


@pytest.fixture(scope="module", autouse=True)
def in_the_background(request: pytest.FixtureRequest) -> Iterator[Session | None]:
    """The longest session goes on while others do: seven times pytest."""
    if not any("remeasured" in getattr(item, "fixturenames", ()) for item in request.session.items):
        yield None
        return
    world: World = request.getfixturevalue("world")
    world.stored("remeasured", "slow steady")
    summary = world.folder / "results" / "remeasured.md"
    session = world.head(
        "remeasured",
        "--vram-compare=HEAD~1",
        f"--vram-base-checkout={world.folder / 'base'}",
        "-k=slow or steady",
        PYTEST_ADDOPTS="--vram-workers=2",
        GITHUB_STEP_SUMMARY=str(summary),
    )
    yield session
    if session.process.poll() is None:
        session.process.send_signal(signal.SIGINT)
        session.process.wait(PATIENCE_S)


@pytest.fixture(scope="module")
def remeasured(in_the_background: Session) -> Session:
    in_the_background.process.wait(PATIENCE_S)
    return in_the_background


# Against what is stored


@pytest.fixture(scope="module")
def against_stored(world: World) -> Session:
    """All of the head's tests, and three workers that the base has stored."""
    world.stored("stored", "slow steady holds breaks goes twice twice#2")
    summary = world.folder / "results" / "stored.md"
    summary.write_text("from a step before\n")
    base = f"--vram-compare={world.commit('base')}"
    return world.head("stored", base, "--junitxml=../report.xml", GITHUB_STEP_SUMMARY=str(summary))


def test_every_verdict_there_is(against_stored: Session) -> None:
    assert against_stored.verdicts == {
        "slow": "worse",
        "steady": "same",
        "holds": "worse",
        "breaks": "worse",
        "comes": "new",
        "goes": "vanished",
        "twice": "same",
        "twice#2": "same",
    }
    assert against_stored.code == pytest.ExitCode.TESTS_FAILED


def test_the_head_gets_as_many_workers_as_a_verdict_takes(against_stored: Session) -> None:
    change = against_stored.change("slow")
    assert change.base == pytest.approx(10, abs=1)
    assert change.head == pytest.approx(16, abs=1)
    assert change.workers is not None
    assert [len(side) for side in change.workers] == [3, 3]
    assert not change.again
    assert {len(record.time.workers) for record in against_stored.run.records if record.status == "ok"} == {1}
    assert any("base not measured again" in note for note in against_stored.comparison.notes)


def test_host_memory_that_grew(against_stored: Session) -> None:
    change = against_stored.change("holds", "memory.host_peak_bytes")
    assert (change.verdict, against_stored.change("holds").verdict) == ("worse", "same")
    assert change.base is not None
    assert change.head is not None
    assert change.head - change.base > 390 * MIB


def test_a_test_that_fails_now(against_stored: Session) -> None:
    reason = against_stored.reason("breaks")
    assert all(word in reason for word in ("ok", "error", "broken in the head"))


def test_the_comparison_is_written_beside_the_run(against_stored: Session, world: World) -> None:
    path, comparison = against_stored.comparison_path, against_stored.comparison
    document = json.loads(path.read_text())
    assert document["failed"] is True
    assert document["counts"] == {"worse": 3, "vanished": 1, "same": 3, "new": 1}
    assert (comparison.base.name, comparison.head.name) == (world.base_run.name, path.name)
    assert world.commit("base").startswith(comparison.base.commit or "none")
    assert world.commit("head").startswith(comparison.head.commit or "none")
    text = path.with_suffix(".md").read_text()
    assert text == as_markdown(comparison)
    assert (world.folder / "results" / "stored.md").read_text() == "from a step before\n" + text


def test_the_terminal_says_what_became_worse(against_stored: Session) -> None:
    text = against_stored.one_line
    assert "compared with the base" in text
    assert "3 worse, 1 vanished, 1 new, 3 same" in text
    assert "base not measured again" in text
    assert "10.0 s 16.0 s +60.0 %" in text
    assert str(against_stored.comparison_path) in text


def test_junit_has_the_figures_and_the_verdicts(against_stored: Session, world: World) -> None:
    assert against_stored.code == 1
    tree = ElementTree.parse(world.folder / "head" / "report.xml")
    (suite,) = tree.iter("testsuite")

    def properties(element: ElementTree.Element) -> dict[str, str]:
        return {str(p.get("name")): str(p.get("value")) for p in element.findall("properties/property")}

    assert properties(suite) == {
        "vram.compared.worse": "3",
        "vram.compared.vanished": "1",
        "vram.compared.new": "1",
        "vram.compared.same": "3",
    }
    found = {str(case.get("name"))[5:]: properties(case) for case in suite.iter("testcase")}
    assert found["steady"]["vram.status"] == "ok"
    assert float(found["steady"]["vram.median_s"]) == pytest.approx(10, abs=1)
    compared = {name: said.get("vram.compared") for name, said in found.items()}
    assert compared.pop("slow") != "same", "its test ends before the times are measured again"
    assert compared == {"steady": "same", "holds": "worse", "breaks": "worse", "comes": None, "twice": "same"}


def test_one_worker_a_side_decides_nothing(world: World) -> None:
    world.stored("latest", "slow steady holds", workers=1)
    session = world.head("latest", "--vram-compare=latest", "-k=slow or steady")
    assert session.verdicts == {"slow": "ambiguous", "steady": "same"}, "what -k leaves out has not vanished"
    assert session.code == pytest.ExitCode.OK
    assert any("1 case" in note and "not in the head" in note for note in session.comparison.notes)
    assert "--vram-workers 3" in session.change("slow").reason
    assert "ambiguous" in session.one_line
    assert session.comparison.base.name == world.base_run.name


def test_ambiguous_fails_where_it_is_strict(world: World) -> None:
    base = world.stored("strict", "slow", workers=1)
    session = world.head("strict", f"--vram-compare={base}", "--vram-strict", "-k=slow")
    assert session.verdicts == {"slow": "ambiguous"}
    assert session.code == pytest.ExitCode.TESTS_FAILED
    assert "strict" in session.one_line
    assert session.comparison.strict


@pytest.fixture(scope="module")
def not_again(world: World) -> Session:
    """Against a base of another torch, in whose checkout the tests cannot be imported."""
    base = world.stored("broken", "slow", commit=world.commit("broken")[:7], torch="0.1", python="2.7")
    checkout = f"--vram-base-checkout={world.folder / 'broken'}"
    return world.head("broken", f"--vram-compare={base}", checkout, "--vram-across=torch,cuda", "-k=slow")


def test_a_base_that_cannot_be_measured_again(not_again: Session, world: World) -> None:
    assert not_again.verdicts == {"slow": "worse"}
    assert not_again.code == pytest.ExitCode.TESTS_FAILED
    change = not_again.change("slow")
    assert change.workers is not None
    assert [len(side) for side in change.workers] == [3, 3]
    assert not change.again
    (why,) = [note for note in not_again.comparison.notes if "could not be measured again" in note]
    assert "base" in why
    assert "none_of_such_name" in why
    assert str(world.folder) not in why
    assert any("base not measured again" in note for note in not_again.comparison.notes)


def test_why_a_base_cannot_be_measured_again(not_again: Session) -> None:
    assert any("none_of_such_name" in note for note in not_again.comparison.notes)


def test_a_key_that_was_lifted_is_said_in_the_title(not_again: Session) -> None:
    assert re.search(r"ACROSS torch 0\.1 → \d", not_again.one_line)
    assert "also other: python 2.7 →" in not_again.one_line
    assert [(d.key, d.base) for d in not_again.comparison.across] == [("torch", "0.1")]


def test_a_pipeline_that_is_installed_is_the_same_on_both_sides(world: World) -> None:
    """So that the base cannot be measured again, and a time that looks slower gets no verdict: that is no success."""
    base = world.stored("installed", "slow", workers=1)
    write(world.folder / "site", {"pipes.py": SLOWER})
    options = [f"--vram-compare={base}", f"--vram-base-checkout={world.folder / 'base'}", "-k=slow"]
    path = os.pathsep.join([str(PLUGIN), str(WARM), str(world.folder / "site")])
    session = world.head("installed", *options, PYTHONPATH=path)
    assert session.verdicts == {"slow": "ambiguous"}
    assert session.code == pytest.ExitCode.USAGE_ERROR
    assert any("outside the checkout" in note for note in session.comparison.notes)
    assert "no verdict" in session.one_line
    assert not session.again("base")


# Interrupted


@pytest.fixture(scope="module")
def interrupted(world: World) -> tuple[Session, list[psutil.Process]]:
    """Ctrl-C while the base is measured again, in a call that does not end; and the processes that there were."""
    world.stored("stuck", "slow steady twice twice#2", commit=world.commit("stuck")[:7])
    checkout = f"--vram-base-checkout={world.folder / 'stuck'}"
    # its processes are looked at: fork servers of their own
    session = world.head("stuck", "--vram-compare=latest", checkout, "-k=slow or steady", PYTEST_PLUGINS="")
    deadline = time.monotonic() + PATIENCE_S
    while not (processes := of_the_base(session.process, world.folder / "stuck")):
        assert session.process.poll() is None, session.output
        assert time.monotonic() < deadline
        time.sleep(0.05)
    session.process.send_signal(signal.SIGINT)
    session.process.wait(PATIENCE_S)
    return session, processes


def of_the_base(process: "subprocess.Popen[bytes]", checkout: Path) -> list[psutil.Process]:
    """All descendants of a session, once pytest in this checkout has a fork server and a worker."""
    try:
        session = psutil.Process(process.pid)
        for child in session.children(recursive=True):
            if f"--rootdir={checkout / 'app'}" in child.cmdline() and len(child.children(recursive=True)) == 2:
                time.sleep(0.2)  # the worker is in its call, and was not the one that looks for a GPU
                found = session.children(recursive=True)
                return found if len(found) >= 4 else []
    except psutil.Error:
        pass
    return []


def test_ctrl_c_while_times_are_measured_again(interrupted: tuple[Session, list[psutil.Process]]) -> None:
    session, _ = interrupted
    assert session.code == pytest.ExitCode.INTERRUPTED
    assert session.verdicts == {"slow": "ambiguous", "steady": "same"}, "-k left out the one that measures twice"
    assert any("interrupted" in note for note in session.comparison.notes)
    assert session.run.complete
    assert "compared with the base" in session.output
    assert "Traceback" not in session.output


def test_ctrl_c_leaves_no_process(interrupted: tuple[Session, list[psutil.Process]]) -> None:
    _, processes = interrupted
    assert len(processes) >= 4
    _, alive = psutil.wait_procs(processes, timeout=15)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


# Estimates


def test_estimates_against_an_earlier_run_of_the_same(world: World) -> None:
    session = world.start("sweep", "estimates", f"--vram-compare={world.estimate}", *ESTIMATES)
    assert session.code == pytest.ExitCode.OK
    (case,) = session.comparison.cases
    assert case.verdict == "same"
    assert {change.verdict for change in case.changes} == {"same"}
    assert {"memory.need_bytes", "memory.allocated_peak_bytes"} <= {change.metric for change in case.changes}
    assert "1 same" in session.one_line
    assert session.comparison.notes == []


# Refused before the first case

# Every case in a fork of a process that has imported pytest: what it says, and its exit code.
DRIVER = """
import json, os, sys
import pytest, pytest_vram.session

for folder, said, arguments in json.loads(sys.argv[1]):
    if (pid := os.fork()) == 0:
        os.chdir(folder)
        output = os.open(said, os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = 70
        try:
            code = int(pytest.main(arguments))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "no such base": (["--vram-compare=nowhere"], ["nowhere", "is no file, no folder, no commit"]),
    "no run of a commit": (["--vram-compare=HEAD~1"], ["HEAD~1", "no finished run"]),
    "no run at all": (["--vram-compare=latest"], ["latest", "no finished run"]),
    "a broken file": (["--vram-compare={broken}"], ["{broken}", "is not JSON"]),
    "no run file": (["--vram-compare={foreign}"], ["{foreign}", "is no run file"]),
    "another torch": (
        ["--vram-compare={torch}"],
        ["{torch}", "torch: 0.1 in the base", "--vram-across torch compares"],
    ),
    "another key lifted": (
        ["--vram-compare={torch}", "--vram-across=cuda,start"],
        ["torch: 0.1", "--vram-across torch"],
    ),
    "another device": (["--vram-compare={estimate}"], ["device: meta in the base, cpu"]),
    "none of the cases": (["--vram-compare={base}", "-k=comes"], ["none of these cases", "test_app.py::test_comes"]),
    "other steps": (
        ["--vram-compare={estimate}", "--vram-steps=3", *ESTIMATES],
        ["{estimate}", "tiny-sd/fp32/32x32/b1", "steps is 2", "3 here", "--vram-across steps"],
    ),
    "an unknown key": (["--vram-compare={base}", "--vram-across=trch"], ["--vram-across", "trch", "mean 'torch'"]),
    "a key of the id": (["--vram-compare={base}", "--vram-across=batch_size"], ["--vram-across", "batch_size"]),
    "strict alone": (["--vram-strict"], ["--vram-strict", "give --vram-compare"]),
    "across alone": (["--vram-across=torch"], ["--vram-across", "give --vram-compare"]),
    "a checkout alone": (["--vram-base-checkout=."], ["--vram-base-checkout", "give --vram-compare"]),
    "a checkout of another commit": (
        ["--vram-compare={base}", "--vram-base-checkout={elsewhere}"],
        ["--vram-base-checkout", "{elsewhere}", "{base_commit}", "{other_commit}"],
    ),
    "the head's own checkout": (
        ["--vram-compare={base}", "--vram-base-checkout=.."],
        ["--vram-base-checkout", "is the checkout that is measured"],
    ),
    "no checkout": (["--vram-compare={base}", "--vram-base-checkout=nowhere"], ["nowhere is no folder"]),
    "changes in the base": (
        ["--vram-compare={dirty}", "--vram-base-checkout={elsewhere}"],
        ["--vram-base-checkout", "with changes"],
    ),
    "nothing that is measured": (["--vram-compare={base}", "--vram-device=meta"], ["--vram-compare", "nothing"]),
}


@pytest.fixture(scope="module")
def refusals(world: World) -> dict[str, tuple[int, str, list[str]]]:
    """Of each: exit code, output, and the words that should be in it."""
    folder = world.folder / "refused"
    write(folder, {"broken.json": "{", "foreign.json": '{"benchmarks": []}'})
    known = {
        "base": world.base_run,
        "broken": folder / "broken.json",
        "foreign": folder / "foreign.json",
        "torch": world.stored("torch", "slow steady", torch="0.1"),
        "dirty": world.stored("dirty", "slow steady", dirty=True),
        "estimate": world.estimate,
        "elsewhere": world.folder / "elsewhere",
        "base_commit": world.commit("base")[:7],
        "other_commit": world.commit("elsewhere")[:7],
    }
    jobs, words = [], []
    for name, (options, said) in REFUSED.items():
        place = "sweep" if "steps" in name else "head/app"
        results = f"--vram-results={folder / name}"
        device = "meta" if "steps" in name else "cpu"
        arguments = ["-p", "no:cacheprovider", results, f"--vram-device={device}"]
        arguments += [option.format_map(known) for option in options]
        jobs.append((str(world.folder / place), str(folder / f"{name}.txt"), arguments))
        words.append([word.format_map(known) for word in said])
    path = os.pathsep.join([str(PLUGIN), str(world.folder / "head" / "lib")])
    environ = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    environ |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-P", "-c", DRIVER, json.dumps(jobs)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    codes = [int(line) for line in done.stdout.split()]
    texts = [Path(said).read_text(encoding="utf-8") for _, said, _ in jobs]
    return dict(zip(REFUSED, zip(codes, texts, words, strict=True), strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_line_and_nothing_is_run(
    world: World, refusals: dict[str, tuple[int, str, list[str]]], name: str
) -> None:
    code, text, words = refusals[name]
    assert code == pytest.ExitCode.USAGE_ERROR, text
    errors = [line for line in text.splitlines() if line.startswith("ERROR")]
    assert len(errors) == 1, text
    assert all(word in errors[0] for word in words), errors[0]
    assert "Traceback" not in text
    assert not (world.folder / "refused" / name).exists()


def test_no_parallel_comparison(world: World) -> None:
    base = world.base_run
    measured = world.head("parallel", "-n=2", f"--vram-compare={base}")
    estimated = world.start("sweep", "parallel-estimates", "-n=2", f"--vram-compare={world.estimate}", *ESTIMATES)
    assert measured.code == pytest.ExitCode.TESTS_FAILED, "each test says so"
    assert estimated.code == pytest.ExitCode.USAGE_ERROR
    for session in (measured, estimated):
        assert "leave -n out" in session.output
        assert not session.results.exists()


# The longest session, last


def test_a_slower_head_is_worse_and_the_untouched_is_not(remeasured: Session) -> None:
    assert remeasured.verdicts == {"slow": "worse", "steady": "same"}
    assert remeasured.code == pytest.ExitCode.TESTS_FAILED
    change = remeasured.change("slow")
    assert change.again
    assert change.workers is not None
    base, head = change.workers
    assert base == pytest.approx([10.0] * 3, abs=1)
    assert head == pytest.approx([16.0] * 3, abs=1)
    assert change.verdict == "worse"
    assert not [note for note in remeasured.comparison.notes if "again" in note]
    assert "measured again" in remeasured.one_line


def test_each_side_ran_its_own_code_and_is_kept(remeasured: Session, world: World) -> None:
    for side, seconds in {"base": 10.0, "head": 16.0}.items():
        runs = remeasured.again(side)
        assert len(runs) == 3
        assert {len(record.time.workers) for record in remeasured.run.records} == {2}, "nor are its options inherited"
        for run in runs.values():
            assert world.commit(side).startswith(run.environment["commit"])
            (record,) = run.records
            assert record.id == "test_app.py::test_slow"
            assert [len(worker.rounds_s) for worker in record.time.workers] == [3]
            assert record.time.median_s == pytest.approx(seconds, abs=1)


def test_the_sides_take_turns(remeasured: Session) -> None:
    names = sorted((name, side) for side in ("base", "head") for name in remeasured.again(side))
    assert [side for _, side in names] == ["base", "head", "head", "base", "base", "head"]


def test_the_step_summary_has_the_comparison_once(remeasured: Session, world: World) -> None:
    assert remeasured.code == 1
    text = (world.folder / "results" / "remeasured.md").read_text()
    assert text == as_markdown(remeasured.comparison)


# In turn, without pytest


class Pretended:
    """A checkout that gives stored records, or raises, turn by turn, and notes what it is asked for."""

    root = Path("/nowhere")

    def __init__(self, side: str, asked: "Asked", stored: Run, *turns: Sequence[Record] | Run | NotMeasured) -> None:
        self.side, self.asked, self.stored, self.turns = side, asked, stored, iter(turns)

    def measure(self, nodes: Sequence[str], options: Sequence[str], results: Path, timeout_s: float) -> Run:
        assert list(options) == [f"--in={self.root}"]
        assert (results.name, timeout_s) == (self.side, 60.0 * len(nodes))
        self.asked.append((self.side, list(nodes)))
        turn = next(self.turns)
        if isinstance(turn, NotMeasured):
            raise turn
        return turn if isinstance(turn, Run) else self.stored.model_copy(update={"records": list(turn)})


Asked = list[tuple[str, list[str]]]
Measure = Callable[..., tuple[dict[str, Again], list[str], Asked]]


@pytest.fixture
def in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Measures again what two checkouts give, turn by turn: what came of it, the notes, and what was asked for."""

    def measure(base: Sequence[Any], head: Sequence[Any]) -> tuple[dict[str, Again], list[str], Asked]:
        records = [one.model_dump(mode="json") for one in both(1.0, 2.0)]
        stored = read_run(put(tmp_path / "base.json", *records, environment=ENVIRONMENT))
        found = Base(BaseOptions(str(tmp_path / "base.json")), stored, tmp_path, tmp_path, {})
        asked: Asked = []
        turns = {"base": base, "head": head}
        sides: Any = {side: Pretended(side, asked, stored, *turns[side]) for side in turns}
        found.checkout = sides["base"]
        monkeypatch.setattr(against, "this_checkout", lambda root: sides["head"])
        tests, models = {"a": "t.py::a", "b": "t.py::b"}, {"a": "sdxl", "b": "sdxl"}
        again, notes = found.measure_again(
            tests, models, lambda root: [f"--in={root}"], tmp_path, 60.0, lambda text: None
        )
        return again, notes, asked

    return measure


def both(a: float, b: float) -> list[Record]:
    return [timed(a, id="a"), timed(b, id="b")]


ALL = ["t.py::a", "t.py::b"]
TURNS = [("base", ALL), ("head", ALL), ("head", ALL), ("base", ALL), ("base", ALL), ("head", ALL)]


def test_three_turns_where_the_workers_agree(in_turn: Measure) -> None:
    again, notes, asked = in_turn([both(1.0, 2.0)] * 3, [both(1.5, 2.0)] * 3)
    assert (asked, notes) == (TURNS, [])
    assert {id: [len(one.base), len(one.head)] for id, one in again.items()} == {"a": [3, 3], "b": [3, 3]}


def test_two_more_turns_for_what_three_workers_do_not_prove(in_turn: Measure) -> None:
    base = [both(1.0, 2.0), both(1.1, 2.0), both(1.0, 2.0), [timed(1.0, id="a")], [timed(1.6, id="a")]]
    again, notes, asked = in_turn(base, [*[both(1.5, 2.0)] * 3, *[[timed(1.5, id="a")]] * 2])
    assert asked == [*TURNS, *((side, ["t.py::a"]) for side in ("head", "base", "base", "head"))]
    assert notes == []
    assert [record.time.median_s for record in again["a"].base] == [1.0, 1.1, 1.0, 1.0, 1.6]
    assert len(again["b"].base) == 3


def test_a_case_that_fails_on_one_side_is_named_and_the_others_go_on(in_turn: Measure) -> None:
    def broken(turn: list[Record]) -> list[Record]:
        return [turn[0], turn[1].model_copy(update={"status": "error"})]

    again, notes, asked = in_turn([broken(both(1.0, 2.0))] * 3, [both(1.5, 2.0)] * 3)
    assert set(again) == {"a"}
    (note,) = notes
    assert "again on both sides" in note
    assert note.endswith(" b")
    assert len(asked) == 6


@pytest.mark.parametrize("side", ["base", "head"])
def test_a_side_without_any_run_ends_it(in_turn: Measure, side: str) -> None:
    turns: dict[str, list[Any]] = {"base": [both(1.0, 2.0)] * 3, "head": [both(1.5, 2.0)] * 3}
    turns[side][1] = NotMeasured("pytest ended with 4")
    again, notes, asked = in_turn(turns["base"], turns["head"])
    assert again == {}
    assert notes == [f"the {side} could not be measured again: pytest ended with 4"]
    assert asked == TURNS[: {"base": 4, "head": 3}[side]]


def test_a_test_that_one_side_does_not_have_is_left_out(in_turn: Measure) -> None:
    one, two, three = ([timed(seconds, id="a")] for seconds in (1.0, 1.0, 1.5))
    base = [NotMeasured("not found", unknown=["t.py::b"]), one, one, two]
    again, notes, asked = in_turn(base, [three] * 3)
    assert set(again) == {"a"}
    assert len(notes) == 1
    assert notes[0].endswith(" b")
    assert asked[0] == ("base", ALL)
    assert {tuple(nodes) for _, nodes in asked[1:]} == {("t.py::a",)}


def test_a_side_that_has_none_of_the_tests_ends_it(in_turn: Measure) -> None:
    again, notes, asked = in_turn([NotMeasured("not found", unknown=ALL)], [])
    assert (again, asked) == ({}, TURNS[:1])
    assert notes == ["the base could not be measured again: not found"]


@pytest.mark.parametrize("side", ["base", "head"])
def test_another_torch_than_the_base_s_run_had_is_no_repetition(in_turn: Measure, side: str) -> None:
    run = Run(environment={**ENVIRONMENT, "torch": "0.1"}, sweep="default", records=both(1.0, 2.0))
    turns: dict[str, list[Any]] = {"base": [both(1.0, 2.0)] * 3, "head": [both(1.5, 2.0)] * 3, side: [run]}
    again, notes, _ = in_turn(turns["base"], turns["head"])
    assert again == {}
    assert len(notes) == 1
    assert notes[0].startswith(f"the {side} could not be measured again: torch is 0.1 there")


def test_records_of_other_cases_are_not_taken(in_turn: Measure) -> None:
    stranger = timed(9.0, id="c")
    base, head = [*both(1.0, 2.0), stranger], [*both(1.5, 2.0), stranger]
    again, notes, _ = in_turn([base] * 3, [head] * 3)
    assert set(again) == {"a", "b"}
    assert notes == []
    longer = [timed(1.0, id="a"), timed(2.0, id="b", case={"steps": 50})]
    again, notes, _ = in_turn([longer] * 3, [head] * 3)
    assert set(again) == {"a"}
    assert len(notes) == 1


def test_nothing_is_run_where_nothing_looks_slower(world: World) -> None:
    """Both sides are the base: no session of theirs can be started."""
    made = read_run(world.base_run)
    base = Base(BaseOptions(str(world.base_run)), made, world.folder, world.folder / "base" / "app", {})
    base.checkout = Checkout(Path("/nowhere"), "/nowhere/python", "")
    names = base.flagged(ReadRun(world.base_run, made))
    assert base.measure_again({}, {}, lambda root: [], world.folder, 60.0, lambda text: None) == ({}, [])
    assert names == []


def test_a_faster_head_does_not_fail_where_it_is_strict(tmp_path: Path) -> None:
    records = [timed(seconds).model_dump(mode="json") for seconds in (2.0, 1.0)]
    before, now = (put(tmp_path / f"{name}.json", one) for name, one in zip(("base", "head"), records, strict=True))
    base = Base(BaseOptions(str(before), strict=True), read_run(now), tmp_path, tmp_path, {})
    head = ReadRun(now, read_run(now))
    assert not base.conclude(head, {}).failed


# Written


def test_what_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = put(tmp_path / "base.json", timed(1.0).model_dump(mode="json"))
    base = Base(BaseOptions(str(stored)), read_run(stored), tmp_path, tmp_path, {})
    comparison = base.conclude(ReadRun(tmp_path / "head.json", read_run(stored)), {}, ["a note"])
    assert comparison.notes == ["a note"]
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    path = against.save(comparison, tmp_path / "head.json")
    assert path == tmp_path / "comparisons" / "head.json"
    assert read_comparison(path) == comparison
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "nowhere" / "summary.md"))
    with pytest.raises(UsageError, match=r"summary\.md cannot be written"):
        against.save(comparison, tmp_path / "head.json")
