"""A sweep on several GPUs: pytest-xdist is real, the driver and its GPUs are played.

Once the tiny model really runs, on the CPU. Elsewhere a case is one line of a script: how long it takes, how it ends.
"""

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from execnet import XSpec

from pytest_vram.errors import UsageError
from pytest_vram.measure import nvml
from pytest_vram.measure.visible import visible_uuids
from pytest_vram.parallel import Controller, count_gpus, part_of
from pytest_vram.records.files import journals_of, read_journal, read_run, run_path_of
from pytest_vram.records.schema import Run
from tests.test_plugin import PATIENCE_S, command, project, run, wait_for

__all__ = ["project"]

PLAYED = """
import json, os, pathlib, signal, time
from types import SimpleNamespace

import pytest_vram.session
from pytest_vram.measure import nvml
from pytest_vram.measure.machine import Machine, start_machine

GPUS = json.loads(pathlib.Path("gpus.json").read_text())
nvml.gpus = lambda: [SimpleNamespace(name=name, uuid=lambda uuid=uuid: uuid) for uuid, name in GPUS.items()]


def start(device, models, **options):
    uuid = os.environ.get("CUDA_VISIBLE_DEVICES", "GPU-aa")
    if REALLY:
        machine = start_machine("cpu", models, allow_shared=True, name_host=True, say=options["say"])
    else:
        machine = Machine("cuda", SimpleNamespace(name="fork", close=lambda: None))
    machine.facts = {"gpu": GPUS[uuid], "gpu_uuid": uuid, "gpu_memory_bytes": 1 << 40}
    return machine


pytest_vram.session.start_machine = start
"""
SCRIPTED = """
from pytest_vram.measure.measurement import CaseInterrupted
from pytest_vram.errors import NotSaved
from pytest_vram.records.files import Journal
from pytest_vram.records.schema import Failure, Record, Time, WorkerTime

SCRIPT = json.loads(pathlib.Path("script.json").read_text())


def no_room(journal):
    raise NotSaved(journal.path, OSError(28, "No space left on device"))


def measure(case, job, machine, *_):
    batch = getattr(case, "batch_size", 0)
    with pathlib.Path("ran.txt").open("a") as file:
        file.write(f"{batch} {machine.facts['gpu_uuid']}\\n")
    common = {"id": case.id, "case": case, "method": "measured"}
    what = SCRIPT.get(str(batch), 0)
    try:
        if what == "crash" and not pathlib.Path("crashed").exists():
            pathlib.Path("crashed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if isinstance(what, str) and what.startswith("until "):
            while not pathlib.Path(what.split()[1]).exists():
                time.sleep(0.02)
        if what == "no room":
            Journal._write = no_room
        pathlib.Path(f"ended-{batch}").touch()
    except KeyboardInterrupt:
        raise CaseInterrupted(Record(status="error", failure=Failure(message="interrupted"), **common)) from None
    if what == "fails":
        return Record(status="error", failure=Failure(message="it fails"), **common)
    return Record(status="ok", time=Time(workers=[WorkerTime(rounds_s=[1.0], median_s=1.0)]), **common)


pytest_vram.session.measure = measure
"""
SAME = {"GPU-aa": "NVIDIA Played", "GPU-bb": "NVIDIA Played"}
BATCHES = "1,2,3,4,5,6"


def play(project: pytest.Pytester, gpus: dict[str, str] = SAME, script: dict[str, Any] | None = None) -> None:
    """GPUs by uuid, and how cases go, by batch size; without a script they really run."""
    (project.path / "gpus.json").write_text(json.dumps(gpus))
    (project.path / "script.json").write_text(json.dumps(script))
    code = PLAYED.replace("REALLY", str(script is None)) + (SCRIPTED if script is not None else "")
    project.makeconftest(code)


def options(*more: str, workers: str = "auto", batches: str = BATCHES) -> list[str]:
    given = ["--vram-device=cuda", "-n", workers, f"--vram-batch-sizes={batches}", "--vram-optimizations=fp32"]
    return [*given, "--vram-no-estimate", *more]


def run_files(project: pytest.Pytester) -> list[Path]:
    return sorted(project.path.glob("results/*/*.json"))


def batches(found: Run) -> list[int]:
    return [record.case.batch_size for record in found.records]  # type: ignore[union-attr]


def ran(project: pytest.Pytester) -> dict[int, list[str]]:
    """On which GPUs each batch size has run."""
    found: dict[int, list[str]] = {}
    path = project.path / "ran.txt"
    for line in path.read_text().splitlines() if path.exists() else ():
        found.setdefault(int(line.split()[0]), []).append(line.split()[1])
    return found


def one_error(result: pytest.RunResult) -> str:
    assert result.ret == pytest.ExitCode.USAGE_ERROR, str(result.stdout) + str(result.stderr)
    (error,) = [line for line in (*result.outlines, *result.errlines) if line.startswith("ERROR")]
    return error


def test_the_tiny_model_on_two_gpus(project: pytest.Pytester) -> None:
    play(project)
    flags = "--vram-optimizations=fp32,fp32+vae_slicing,fp32+device_map_balanced"
    given = ["--vram-device=cuda", "-n", "auto", flags, "--vram-rounds=5", "--vram-batch-sizes=1,2"]
    result = run(project, *given)
    result.assert_outcomes(passed=4, skipped=2)
    (path,) = run_files(project)
    assert path.parent.name == "nvidia-played"
    assert not list(project.path.glob("results/*/*.jsonl"))
    found = read_run(path)
    assert found.complete
    assert (found.wall_s or 0) > 0
    ids = [record.id.removeprefix("tiny-sd/") for record in found.records]
    sets = ("fp32", "fp32+vae_slicing", "fp32+device_map_balanced")
    assert sorted(ids, key=ids.index) == [f"{flags}/32x32/b{batch}" for flags in sets for batch in (1, 2)]
    parts = {part["gpu_uuid"]: part["cases"] for part in found.environment["merged"]}
    assert parts.keys() == SAME.keys()
    assert sorted(id for cases in parts.values() for id in cases) == sorted(record.id for record in found.records)
    for record in found.records:
        if "device_map_balanced" in record.case.optimizations:
            assert record.reason == "it takes 2 GPUs, and -n gives each case one: leave -n out"
            continue
        assert record.status == "ok", record.failure
        assert record.memory.estimated_need_bytes, "estimated by one of the two for both"
        assert (record.exact is True) is ("vae_slicing" in record.case.optimizations)
    text = str(result.stdout)
    assert "vram: 2 GPUs, an xdist worker for each" in text
    assert re.search(r"6/6 tiny-sd/\S+: ", text)
    assert f"run file: {path.relative_to(project.path)}" in text
    assert "on 2 GPUs" in text


def test_what_waits_behind_a_long_case_goes_to_the_gpu_that_is_free(project: pytest.Pytester) -> None:
    play(project, script={"1": "until ended-6"})  # the other GPU runs all else, or this never ends
    result = run(project, *options(workers="2"))
    result.assert_outcomes(passed=6)
    where = ran(project)
    assert [len(gpus) for _, gpus in sorted(where.items())] == [1] * 6
    (first,) = where.pop(1)
    assert {gpu for gpus in where.values() for gpu in gpus} == SAME.keys() - {first}
    (path,) = run_files(project)
    assert batches(read_run(path)) == [1, 2, 3, 4, 5, 6]
    play(project, script={"2": "fails"})
    compared = run(project, *options(f"--vram-compare={path}", batches="1,2"))
    compared.assert_outcomes(passed=1, failed=1)
    compared.stdout.fnmatch_lines(["worse * tiny-sd/fp32/32x32/b2", "*ok → error: it fails", "1 worse, 1 same"])


def test_a_crashed_xdist_worker_costs_its_case_and_resume_goes_on(project: pytest.Pytester) -> None:
    play(project, script={"3": "crash", "4": "fails", "2": "until crashed"})
    result = run(project, *options())
    result.assert_outcomes(passed=4, failed=2)
    text = str(result.stdout)
    assert "crashed while running 'test_it.py::test_generation[tiny-sd/fp32/32x32/b3]'" in text
    (path,) = run_files(project)
    first = read_run(path)
    assert not first.complete
    assert batches(first) == [1, 2, 4, 5, 6]
    assert {gpu for gpus in ran(project).values() for gpu in gpus} == SAME.keys(), "another one took its GPU"
    play(project, script={})
    (project.path / "ran.txt").unlink()
    run(project, *options("--vram-resume")).assert_outcomes(passed=6)
    assert sorted(ran(project)) == [3, 4]
    (again,) = run_files(project)
    assert again == path
    whole = read_run(path)
    assert whole.complete
    assert batches(whole) == [1, 2, 3, 4, 5, 6]
    assert whole.records[0] == first.records[0]


def test_what_no_journal_had_room_for_is_in_the_run_file(project: pytest.Pytester) -> None:
    play(project, script={"1": "until ended-2", "2": "no room", "3": "no room"})
    result = run(project, *options())
    result.assert_outcomes(passed=6)
    (path,) = run_files(project)
    assert (read_run(path).complete, batches(read_run(path))) == (True, [1, 2, 3, 4, 5, 6])
    play(project, {"GPU-aa": "NVIDIA Played", "GPU-bb": "NVIDIA Other"}, {"2": "no room", "1": "until ended-2"})
    result = run(project, *options(batches="1,2"))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    lost = "vram: no journal had room for tiny-sd/fp32/32x32/b2: free some space and run them again"
    assert lost in str(result.stdout)


def started(project: pytest.Pytester, *given: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command(*given),
        cwd=project.path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def journals(project: pytest.Pytester) -> list[Path]:
    return sorted(project.path.glob("results/*/*.jsonl"))


def both_wait(project: pytest.Pytester) -> bool:
    """Whether one of two GPUs has ended its first case, and both are in a case that does not end."""
    ended = sum(len(read_journal(path).records) for path in journals(project))
    return ended == 1 and {2, 3} <= ran(project).keys()


STUCK = {"2": "until never", "3": "until never"}


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_measured_is_joined_after(project: pytest.Pytester, signal_number: signal.Signals) -> None:
    play(project, script=STUCK)
    process = started(project, *options(batches="1,2,3,4"))
    wait_for(lambda: both_wait(project))
    if signal_number is signal.SIGINT:
        os.killpg(process.pid, signal_number)  # Ctrl-C goes to all of them
    else:
        process.send_signal(signal_number)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == pytest.ExitCode.INTERRUPTED, output
    (path,) = run_files(project)
    found = read_run(path)
    assert not found.complete
    assert [(record.status, record.failure and record.failure.message) for record in found.records] == [
        ("ok", None),
        ("error", "interrupted"),
        ("error", "interrupted"),
    ]
    assert not journals(project)
    assert "run file: " in output


def test_the_journals_of_a_killed_controller_are_gone_on_with(project: pytest.Pytester) -> None:
    play(project, script=STUCK)
    process = started(project, *options(batches="1,2,3,4"))
    wait_for(lambda: both_wait(project))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE_S)
    left = journals(project)
    assert [path.name.split(".")[1] for path in left] == ["gw0", "gw1"]
    assert len({run_path_of(path) for path in left}) == 1
    assert journals_of(run_path_of(left[0])) == left
    play(project, script={"2": "until never"})
    process = started(project, *options("--vram-resume", batches="1,2,3,4"))
    wait_for(lambda: (project.path / "ended-4").exists() and (project.path / "ended-3").exists())
    wait_for(lambda: {record.id[-2:] for path in left for record in read_journal(path).records} == {"b1", "b3", "b4"})
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=PATIENCE_S)
    assert journals(project) == left, "those of the first run, and longer"
    play(project, script={})
    (project.path / "ran.txt").unlink()
    run(project, *options("--vram-resume", workers="0", batches="1,2,3,4")).assert_outcomes(passed=4)
    assert sorted(ran(project)) == [2]
    (path,) = run_files(project)
    assert path == run_path_of(left[0])
    whole = read_run(path)
    assert whole.complete
    assert sorted(batches(whole)) == [1, 2, 3, 4]
    assert not journals(project)


REFUSED = {
    "more than GPUs": (["-n", "3"], "-n 3: there are 2 GPUs, and each runs one case at a time; give -n auto"),
    "nothing to resume": (["-n", "2", "--vram-resume"], "--vram-resume: no unfinished run in results/nvidia-played"),
}


@pytest.mark.parametrize(("given", "said"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_one_line_before_the_first_case(
    project: pytest.Pytester, given: list[str], said: str
) -> None:
    play(project, script={})
    assert f"ERROR: {said}" in one_error(run(project, "--vram-device=cuda", "--vram-no-estimate", *given))
    assert not (project.path / "ran.txt").exists()
    assert not list(project.path.glob("results/*/*"))


def controlled(count: int, dist: str = "load", spec: str = "popen") -> Controller:
    config: Any = SimpleNamespace(option=SimpleNamespace(dist=dist))
    return Controller(config, [XSpec(spec) for _ in range(count)])


def test_each_xdist_worker_gets_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, ["NVIDIA A"] * 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    controller = controlled(2)
    given = []
    for name, uuid in (("gw0", "GPU-b"), ("gw1", "GPU-aa"), ("gw2", "GPU-b")):  # the last in place of the first
        spec = SimpleNamespace(env={"CUDA_VISIBLE_DEVICES": uuid})
        node: Any = SimpleNamespace(gateway=SimpleNamespace(id=name, spec=spec), workerinput={})
        controller.pytest_configure_node(node)
        part = part_of(node)
        assert part
        given.append((part.worker, part.number, part.of))
    assert given == [("gw0", 0, 2), ("gw1", 1, 2), ("gw2", 0, 2)]
    controller.close()
    refused: list[tuple[dict[str, Any], str]] = [
        ({"count": 3}, "-n 3: there are 2 GPUs"),
        ({"count": 2, "dist": "each"}, "--dist each: each case goes to the next GPU that is free"),
        ({"count": 1, "spec": "ssh=elsewhere"}, "--tx: an xdist worker gets one GPU of this machine"),
    ]
    for wrong, said in refused:
        with pytest.raises(pytest.UsageError, match=said):
            controlled(**wrong)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(pytest.UsageError, match="--gpu: CUDA_VISIBLE_DEVICES=-1 leaves no GPU"):
        controlled(1)


MORE = """
import pathlib
import pytest

def build(): ...
def call(pipe): ...

@pytest.fixture(scope="module", autouse=True)
def around():
    yield

@pytest.mark.parametrize("number", range(4))
def test_number(number):
    with pathlib.Path("more.txt").open("a") as file:
        file.write(f"{number}\\n")

def test_pipeline(vram):
    assert vram.measure(build, call).status == "ok"
"""


def test_different_gpus_have_a_run_file_each_and_other_tests_run_once(project: pytest.Pytester) -> None:
    # while one GPU is in its first case the other goes on to the next file, with its own pipeline
    play(project, {"GPU-aa": "NVIDIA Played", "GPU-bb": "NVIDIA Other"}, script={"1": "until ended-0"})
    (project.path / "test_more.py").write_text(MORE)
    result = run(project, *options(batches="1,2,3,4"))
    result.assert_outcomes(passed=9)
    assert sorted((project.path / "more.txt").read_text().split()) == ["0", "1", "2", "3"]
    paths = run_files(project)
    assert [path.parent.name for path in paths] == ["nvidia-other", "nvidia-played"]
    assert all(f"run file: {path.relative_to(project.path)}" in str(result.stdout) for path in paths)
    runs = [read_run(path) for path in paths]
    assert [one.environment["gpu"] for one in runs] == ["NVIDIA Other", "NVIDIA Played"]
    assert not any(one.complete for one in runs), "each lacks the other's cases"
    own = "test_more.py::test_pipeline"
    cases = [f"tiny-sd/fp32/32x32/b{batch}" for batch in (1, 2, 3, 4)]
    assert sorted(record.id for one in runs for record in one.records) == [own, *cases]
    for one in runs:
        ids = [record.id for record in one.records]
        assert ids == sorted(ids, key=[*cases, own].index)


# Which GPUs there are


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, ["GPU-aa", "GPU-ab", "GPU-b"]),
        ("2,0", ["GPU-b", "GPU-aa"]),
        ("0, GPU-b ,0", ["GPU-aa", "GPU-b"]),
        ("1,7,0", ["GPU-ab"]),
        ("1,-1,0", ["GPU-ab"]),
        ("MIG-1,MIG-2", ["MIG-1", "MIG-2"]),
        ("", []),
    ],
)
def test_gpus_are_counted_as_cuda_reads_its_variable(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, found: list[str]
) -> None:
    machine(monkeypatch, ["NVIDIA A"] * 3)
    monkeypatch.setattr(nvml, "gpu_by_uuid", lambda uuid: SimpleNamespace(uuid=lambda: uuid))
    assert visible_uuids({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == found


def machine(monkeypatch: pytest.MonkeyPatch, names: Iterable[str]) -> None:
    uuids = ["GPU-aa", "GPU-ab", "GPU-b"]
    gpus = [SimpleNamespace(name=name, uuid=lambda uuid=uuid: uuid) for name, uuid in zip(names, uuids, strict=False)]
    monkeypatch.setattr(nvml, "gpus", lambda: gpus)


def test_numbers_of_different_gpus_say_nothing_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, ["NVIDIA A", "NVIDIA B"])
    with pytest.raises(UsageError, match="CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        visible_uuids({"CUDA_VISIBLE_DEVICES": "0,1"})
    assert visible_uuids({"CUDA_VISIBLE_DEVICES": "GPU-ab"}) == ["GPU-ab"]
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert visible_uuids() == ["GPU-ab"]


def test_without_a_driver_auto_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> list[nvml.Gpu]:
        raise nvml.NvmlUnavailable("no NVIDIA driver answers")

    monkeypatch.setattr(nvml, "gpus", none)
    option = SimpleNamespace(collectonly=False)
    config: Any = SimpleNamespace(getoption=lambda name: "cuda", option=option)
    with pytest.raises(pytest.UsageError, match="--gpu: no NVIDIA driver answers; leave --gpu out for the estimate"):
        count_gpus(config)
    option.collectonly = True
    assert count_gpus(config) is None, "what is only collected needs none"
    estimating: Any = SimpleNamespace(getoption=lambda name: "meta", option=SimpleNamespace(collectonly=False))
    assert count_gpus(estimating) is None, "and xdist counts CPUs for estimates"
