"""What a sweep makes of what happens to it: pytest, with workers that play their part and hold no pipeline."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pytest_vram.interrupting import terminate_as_ctrl_c
from pytest_vram.records.files import read_journal, read_run
from pytest_vram.records.schema import Record, Run
from tests.test_plugin import wait_for

ROOT = Path(__file__).parents[1]
PATIENCE_S = 60.0
LARGEST_FILE = 6000  # bytes: room for the head of a journal and for some of its four records
B1, B2, SLICED_B1, SLICED_B2 = CASES = [
    f"tiny-sd/{flags}/32x32/b{size}" for flags in ("fp32", "fp32+vae_slicing") for size in (1, 2)
]
CONFTEST = """
import json, time
from dataclasses import replace
from pathlib import Path

from pytest_vram import session
from pytest_vram.measure.forkserver import ForkServer
from pytest_vram.measure.machine import Machine
from pytest_vram.records import files

measure, write_run = session.measure, files.write_run


def played(case, job, machine, settings, *rest):
    script = json.loads(Path("scripts.json").read_text()).get(case.id, {})
    job["model"]["pipeline_arguments"] = {"script": json.dumps(script)}
    task = script.get("task", "generate")
    return measure(case, job, machine, replace(settings, task=f"tests.measure.tasks:{task}"), *rest)


def slow_write(*arguments):
    if Path("slow").exists():
        Path("writing").touch()
        time.sleep(60)
    write_run(*arguments)


session.measure, files.write_run = played, slow_write
session.start_machine = lambda device, *_, **__: Machine(device, ForkServer(["tests.measure.tasks"]))
"""


class Project:
    """A folder with four cases; `play` says what their workers do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "models").mkdir()
        for name in ("models/tiny-sd.toml", "matrix.toml"):
            (folder / name).write_text((ROOT / "tests" / name).read_text())
        (folder / "conftest.py").write_text(CONFTEST)
        (folder / "pytest.ini").write_text("[pytest]\n")
        (folder / "test_it.py").write_text("def test_generation(vram_case):\n    vram_case.run()\n")
        self.play()
        self.processes: list[subprocess.Popen[str]] = []

    def play(self, **scripts: Any) -> None:
        """Scripts of tasks.py by the case's name in this module, such as `B1`; all others go well."""
        named = {globals()[name]: script for name, script in scripts.items()}
        (self.folder / "scripts.json").write_text(json.dumps(named))

    def start(self, *options: str, largest_file: int | None = None) -> "subprocess.Popen[str]":
        def prepare() -> None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # which a shell's background jobs ignore
            if largest_file is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

        command = [sys.executable, "-m", "pytest", "-p", "pytest_vram.plugin"]
        command += [
            f"-pno:{plugin}" for plugin in ("cacheprovider", "anyio", "hypothesispytest", "xdist")
        ]  # which take time to import
        process = subprocess.Popen(
            [*command, "--vram-device=cpu", *options],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'plugin'}:{ROOT}", "PYTEST_ADDOPTS": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=prepare,
        )
        self.processes.append(process)
        return process

    def run(self, *options: str, largest_file: int | None = None) -> tuple[int, str]:
        """pytest's exit code and what it said; nothing of it runs on."""
        return self.end(self.start(*options, largest_file=largest_file))

    def end(self, process: "subprocess.Popen[str]", family: list[psutil.Process] | None = None) -> tuple[int, str]:
        """The same of a process that is to end by itself; none of its `family` runs on."""
        output, _ = process.communicate(timeout=PATIENCE_S)
        running = psutil.wait_procs(family or [], timeout=3)[1]
        assert not [one for one in running if one.status() != psutil.STATUS_ZOMBIE]
        assert "Traceback" not in output
        assert "INTERNALERROR" not in output
        return process.returncode, output

    def files(self, pattern: str) -> list[Path]:
        return sorted((self.folder / "results").glob(f"*/{pattern}"))

    def found(self) -> Run:
        """The one run file."""
        (path,) = self.files("*.json")
        return read_run(path)

    def at_work(self, process: "subprocess.Popen[str]", records: int) -> list[psutil.Process]:
        """Wait until so many records are in the journal and the next worker runs: all processes of pytest then."""

        def look() -> Any:
            paths = self.files("*.jsonl")
            if not paths or len(read_journal(paths[0]).records) < records:
                return None
            with contextlib.suppress(psutil.Error):
                family = psutil.Process(process.pid).children(recursive=True)
                return family if len(family) == 2 else None

        found: list[psutil.Process] = wait_for(look)
        return found


def statuses(run: Run) -> dict[str, str]:
    return {record.id: record.status for record in run.records}


def why(record: Record) -> str:
    assert record.failure is not None
    return record.failure.message


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    project = Project(tmp_path)
    yield project
    for process in project.processes:
        process.kill()
        process.communicate()


SLEEP = {"task": "sleep"}


def test_a_ci_that_times_out_gets_what_was_found(project: Project) -> None:
    project.play(B2=SLEEP)
    process = project.start()
    family = project.at_work(process, 1)
    process.send_signal(signal.SIGTERM)
    code, output = project.end(process, family)
    assert code == pytest.ExitCode.INTERRUPTED
    assert "run file: " in output
    assert not project.files("*.jsonl")
    run = project.found()
    assert (run.complete, statuses(run)) == (False, {B1: "ok", B2: "error"})
    assert why(run.records[1]) == "interrupted"
    project.play()
    assert project.run("--vram-resume")[0] == 0
    whole = project.found()
    assert (whole.complete, statuses(whole)) == (True, dict.fromkeys(CASES, "ok"))
    assert whole.records[0] == run.records[0]


def test_a_signal_that_somebody_else_handles_is_left_to_them() -> None:
    before = signal.getsignal(signal.SIGTERM)
    theirs: list[Any] = [signal.SIG_IGN, lambda *_: None]
    try:
        for handler in theirs:
            signal.signal(signal.SIGTERM, handler)
            restore = terminate_as_ctrl_c()
            assert signal.getsignal(signal.SIGTERM) is handler
            restore()
            assert signal.getsignal(signal.SIGTERM) is handler
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        restore = terminate_as_ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        restore()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "as CI does"])
def test_twice_ends_at_once_and_the_journal_stays(project: Project, second: signal.Signals) -> None:
    project.play(B2=SLEEP)
    (project.folder / "slow").touch()
    process = project.start()
    family = project.at_work(process, 1)
    process.send_signal(signal.SIGINT)
    wait_for((project.folder / "writing").exists)
    began = time.monotonic()
    process.send_signal(second)
    code, output = project.end(process, family)
    assert time.monotonic() - began < 10
    assert code == pytest.ExitCode.INTERRUPTED
    assert "vram: interrupted twice" in output
    assert not project.files("*.json")
    (journal,) = project.files("*.jsonl")
    assert statuses(read_journal(journal)) == {B1: "ok", B2: "error"}


def test_resume_tries_again_what_failed_and_leaves_what_has_a_result(project: Project) -> None:
    oom = {"failed": {"status": "oom", "phase": "denoise", "message": "OutOfMemoryError: CUDA"}}
    project.play(B2=oom, SLICED_B1={"task": "die"}, SLICED_B2={"task": "freeze"})
    code, output = project.run("--vram-timeout=2")
    assert code == pytest.ExitCode.TESTS_FAILED
    first = project.found()
    assert first.complete
    assert statuses(first) == {B1: "ok", B2: "oom", SLICED_B1: "error", SLICED_B2: "timeout"}
    assert "killed by signal 9" in why(first.records[2])
    assert why(first.records[3]) == "no result within 2 s in load (--vram-timeout)"
    assert "killed by signal 9" in output
    project.play()
    assert project.run("--vram-timeout=2", "--vram-resume")[0] == 0
    second = project.found()
    assert statuses(second) == {B1: "ok", B2: "oom", SLICED_B1: "ok", SLICED_B2: "ok"}
    assert second.records[:2] == first.records[:2]


def test_a_full_disk_is_said_and_what_there_was_room_for_is_gone_on_with(project: Project) -> None:
    code, output = project.run(largest_file=LARGEST_FILE)
    assert code == pytest.ExitCode.TESTS_FAILED
    assert not project.files("*.json*.part")
    assert not project.files("*.json")
    (journal,) = project.files("*.jsonl")
    lines = [line for line in output.splitlines() if "could not be written: File too large" in line]
    assert len(lines) == 2, output
    assert re.search(r"^vram: .*\.jsonl could not .*: File too large; what is found is kept in memory", lines[0])
    assert re.search(r"^vram: .*\.json could .*has the records, but for the last \d that .*: free some space", lines[1])
    kept = read_journal(journal)
    assert 0 < len(kept.records) < 4
    assert "4 passed" in output  # the rest goes on
    code, output = project.run("--vram-resume")
    assert code == 0, output
    assert statuses(project.found()) == dict.fromkeys(CASES, "ok")
    assert project.found().records[: len(kept.records)] == kept.records


def test_two_sweeps_on_one_folder_and_a_machine_that_loses_power(project: Project) -> None:
    project.play(B2=SLEEP)
    process = project.start()
    family = project.at_work(process, 1)
    (journal,) = project.files("*.jsonl")
    code, output = project.run("--vram-resume")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert f"{journal.name} belongs to a sweep that is still running" in output
    process.kill()
    project.end(process, family)
    with journal.open("ab") as file:
        file.write(journal.read_bytes().splitlines()[-1][:100])  # what the disk had of the next line
    first = read_journal(journal).records
    project.play()
    code, output = project.run("--vram-resume")
    assert code == 0, output
    assert f"vram: --vram-resume: the last line of {journal.name} was cut off: its case is run again" in output
    whole = read_run(journal.with_suffix(".json"))
    assert (whole.complete, statuses(whole)) == (True, dict.fromkeys(CASES, "ok"))
    assert whole.records[:1] == first


def test_durations_are_of_a_clock_that_does_not_jump() -> None:
    """Time of day stands in names and says when a run began; nothing is subtracted from it."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "plugin").rglob("*.py")]
    assert any("time.monotonic()" in source for source in sources)
    assert not [source for source in sources if "time.time(" in source]
    said = [after for source in sources for after in re.findall(r"datetime\.(?:utc)?now\([^)]*\)(\S*)", source)]
    assert said
    assert all(re.match(r"\.(strftime|isoformat)\(", after) for after in said), said
