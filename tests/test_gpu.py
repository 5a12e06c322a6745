"""What only a real GPU shows; `pytest -m gpu` on a machine that has one."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from pytest_vram.cases.models import read_models
from pytest_vram.measure import machine, nvml
from pytest_vram.measure.locking import visible_gpus
from pytest_vram.records.files import read_journal, read_run
from pytest_vram.records.schema import Record, Run

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[1]
MIB = 1 << 20
SD15 = "stable-diffusion-v1-5/fp16/512x512/b1"
PATIENCE_S = 120.0


@pytest.fixture(scope="module", autouse=True)
def gpu() -> nvml.Gpu:
    """The first that CUDA uses."""
    gpus = visible_gpus(1)
    if not gpus:
        pytest.skip("no GPU that CUDA uses")
    return gpus[0]


def command(results: Path, *options: str) -> list[str]:
    fixed = ["--gpu", "--vram-sweep=smoke", "-k", "stable-diffusion-v1-5/fp16/512x512", "--vram-rounds=5"]
    return [sys.executable, "-m", "pytest", "bench", *fixed, f"--vram-results={results}", *options]


NO_NEED = "--vram-no-need"


def run(results: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command(results, *options), cwd=ROOT, capture_output=True, text=True, check=False)


def only_run(results: Path) -> Run:
    (path,) = results.glob("*/*.json")
    return read_run(path)


def only_record(results: Path) -> Record:
    (record,) = only_run(results).records
    return record


def is_idle(gpu: nvml.Gpu, before: int) -> None:
    """Wait until the GPU holds what it held before, and no process."""
    deadline = time.monotonic() + 5
    while gpu.processes() or (gpu.used_bytes() or 0) > before + MIB:
        assert time.monotonic() < deadline, (gpu.processes(), gpu.used_bytes(), before)
        time.sleep(0.02)


def test_a_case_is_measured_whole(gpu: nvml.Gpu, tmp_path: Path) -> None:
    result = run(tmp_path / "results", f"--vram-save-images={tmp_path / 'images'}")
    assert result.returncode == 0, result.stdout
    record = only_record(tmp_path / "results")
    memory = record.memory
    assert record.id == SD15
    assert record.status == "ok"
    weights, allocated, reserved = memory.weights_bytes, memory.allocated_peak_bytes, memory.reserved_peak_bytes
    assert weights
    assert allocated
    assert reserved
    assert memory.nvml_process_peak_bytes
    assert weights < allocated < reserved < memory.nvml_process_peak_bytes
    assert (memory.context_bytes or 0) > 100 * MIB
    assert memory.estimated_allocated_peak_bytes == pytest.approx(allocated, rel=0.01)
    assert memory.need_bytes
    assert memory.context_bytes
    assert weights < memory.need_bytes <= reserved
    assert memory.required_bytes == memory.need_bytes + memory.context_bytes
    assert memory.estimated_need_bytes == pytest.approx(memory.need_bytes, rel=0.05)
    assert (record.time.at_need_s or 0) > 0
    assert record.wall
    assert 1 <= record.wall.probes <= 8
    assert set(record.phases) == {"load", "encode", "denoise", "decode"}
    assert max(cost.allocated_peak_bytes or 0 for cost in record.phases.values()) == allocated
    assert [state.sm_clock_mhz for state in record.telemetry.rounds if state.sm_clock_mhz]
    assert len(record.telemetry.rounds) == len(record.time.workers[0].rounds_s) == 5
    assert (record.time.cold_s or 0) > (record.time.median_s or 0)
    assert len(list((tmp_path / "images").glob("*.png"))) == 1


def test_a_pipeline_of_ones_own_has_a_need(tmp_path: Path) -> None:
    example = [sys.executable, "-m", "pytest", "docs/example", "--gpu", f"--vram-results={tmp_path}"]
    result = subprocess.run(example, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    record = only_record(tmp_path)
    assert record.memory.need_bytes
    assert record.memory.required_bytes
    assert record.memory.need_bytes <= (record.memory.reserved_peak_bytes or 0)
    assert set(record.phases) == {"load", "encode", "denoise", "decode"}


def test_a_limit_is_what_a_smaller_card_would_do(tmp_path: Path) -> None:
    assert run(tmp_path / "small", "--vram-limit=2GiB", NO_NEED).returncode == 0
    failure = only_record(tmp_path / "small").failure
    assert failure
    assert failure.limit_bytes == 2 << 30
    assert failure.phase == "load"
    assert failure.requested_bytes
    assert run(tmp_path / "enough", "--vram-limit=3500MiB", NO_NEED).returncode == 0
    enough = only_record(tmp_path / "enough")
    assert enough.status == "ok"
    assert (enough.memory.nvml_process_peak_bytes or 0) <= 3500 * MIB


@pytest.mark.parametrize("who", ["Ctrl-C", "SIGTERM", "pytest", "worker"])
def test_whoever_dies_leaves_no_process_and_no_gpu_memory(gpu: nvml.Gpu, tmp_path: Path, who: str) -> None:
    before = gpu.used_bytes() or 0
    arguments = [*command(tmp_path, "--vram-steps=200"), "--vram-timeout=100"]
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + PATIENCE_S
    while not any((used or 0) > 2000 * MIB for used in gpu.processes().values()):
        assert time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    (worker,) = gpu.processes()
    if who == "worker":
        psutil.Process(worker).kill()
    else:
        sent = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM, "pytest": signal.SIGKILL}
        process.send_signal(sent[who])
    output, _ = process.communicate(timeout=PATIENCE_S)
    is_idle(gpu, before)
    assert not psutil.wait_procs(family, timeout=3)[1]
    if who == "pytest":
        (journal,) = tmp_path.glob("*/*.jsonl")
        assert read_journal(journal).records == []
    else:
        assert process.returncode == (1 if who == "worker" else 2), output
        message = only_record(tmp_path).failure
        assert message
        assert message.message.startswith("the worker was killed by signal 9" if who == "worker" else "interrupted")


def test_what_ends_badly_on_the_gpu_costs_its_own_case(gpu: nvml.Gpu, tmp_path: Path) -> None:
    """bench/poisoned.py; while its kernel spins the fork server is killed, too."""
    before = gpu.used_bytes() or 0
    options = ["--gpu", NO_NEED, "--vram-timeout=15", "--vram-rounds=5", f"--vram-results={tmp_path}"]
    arguments = [sys.executable, "-m", "pytest", "bench/poisoned.py", *options]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + PATIENCE_S
    while not any(len(read_journal(path).records) >= 3 for path in tmp_path.glob("*/*.jsonl")) or not gpu.processes():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1)
    family = psutil.Process(process.pid).children(recursive=True)
    (server,) = psutil.Process(process.pid).children()
    server.kill()
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1, output
    records = {record.id.split("[")[1].split("]")[0]: record for record in only_run(tmp_path).records}
    assert {name: record.status for name, record in records.items()} == {
        "device_side_assert": "error",
        "illegal_address": "error",
        "out_of_memory": "oom",
        "spin": "timeout",
        "healthy": "ok",
    }, output
    said = {name: record.failure.message for name, record in records.items() if record.failure}
    assert "device-side assert" in said["device_side_assert"]
    assert "illegal memory access" in said["illegal_address"]
    assert records["out_of_memory"].failure
    assert records["out_of_memory"].failure.requested_bytes == 1 << 45
    assert "no result within" in said["spin"]
    assert "the fork server was killed by signal 9" in (records["spin"].disturbed or "")
    assert records["healthy"].disturbed is None
    is_idle(gpu, before)
    running = psutil.wait_procs(family, timeout=3)[1]
    assert not [one for one in running if one.status() != psutil.STATUS_ZOMBIE]  # without its server nobody collects it


@pytest.fixture
def neighbour() -> Iterator[None]:
    """Another process that uses the GPU."""
    code = "import torch, time; x = torch.zeros(1 << 28, device='cuda'); print('there', flush=True); time.sleep(300)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline().strip() == "there"
    yield
    process.kill()
    process.communicate()


def test_a_shared_gpu_is_refused_or_said(neighbour: None, tmp_path: Path) -> None:
    refused = run(tmp_path / "refused")
    assert refused.returncode == 4
    assert "--vram-allow-shared" in refused.stderr
    assert not (tmp_path / "refused").exists()
    assert run(tmp_path / "allowed", "--vram-allow-shared", NO_NEED).returncode == 0
    record = only_record(tmp_path / "allowed")
    assert record.disturbed
    assert (record.memory.nvml_device_peak_bytes or 0) < 5 << 30


def test_two_sweeps_queue_and_do_not_disturb_each_other(gpu: nvml.Gpu, tmp_path: Path) -> None:
    first = subprocess.Popen(
        command(tmp_path / "first", NO_NEED), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + PATIENCE_S
    while not gpu.processes():
        assert time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.02)
    second = run(tmp_path / "second", NO_NEED)
    output, _ = first.communicate(timeout=PATIENCE_S)
    assert (first.returncode, second.returncode) == (0, 0), output + second.stdout + second.stderr
    assert f"vram: waiting for pid {first.pid}: another sweep measures on this GPU" in second.stdout
    assert [only_record(tmp_path / name).disturbed for name in ("first", "second")] == [None, None]


def test_a_process_that_comes_during_a_case_disturbs_it(gpu: nvml.Gpu, tmp_path: Path) -> None:
    sweep = subprocess.Popen(
        command(tmp_path, NO_NEED, "--vram-steps=200"), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + PATIENCE_S
    while not any((used or 0) > 2000 * MIB for used in gpu.processes().values()):  # past the canary
        assert time.monotonic() < deadline, sweep.communicate()[0]
        time.sleep(0.02)
    comes = subprocess.Popen([sys.executable, "-c", "import torch; torch.zeros(1, device='cuda')"])
    output, _ = sweep.communicate(timeout=PATIENCE_S)
    assert comes.wait() == 0
    assert sweep.returncode == 0, output
    record = only_record(tmp_path)
    assert f"(pid {comes.pid})" in (record.disturbed or "")
    assert record.unavailable["energy_j_per_image"] == "other processes used the GPU meanwhile"


def test_energy_of_an_image_is_power_by_time(tmp_path: Path) -> None:
    assert run(tmp_path, NO_NEED, "--vram-rounds=60").returncode == 0
    record = only_record(tmp_path)
    power = [state.power_w for state in record.telemetry.rounds if state.power_w]
    assert record.energy_j_per_image, record.unavailable
    assert record.time.images_per_s
    watts = record.energy_j_per_image * record.time.images_per_s
    assert watts == pytest.approx(sum(power) / len(power), rel=0.15)  # NVML's power is an average of a second


def test_workers_are_spawned_where_the_fork_server_has_spoilt_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the variable, importing diffusers initialises CUDA, and no forked child can use it."""
    monkeypatch.setattr("pytest_vram.measure.forkserver.PRELOAD_ENVIRON", {"PYTORCH_NVML_BASED_CUDA_CHECK": "0"})
    models = [read_models()["stable-diffusion-v1-5"]]
    found = machine.start_machine("cuda", models, allow_shared=False, name_host=False, say=print)
    assert found.starter.name == "spawn"
    assert found.context_bytes > 100 * MIB
    found.close()


def test_doctor_finds_nothing_missing() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest_vram.cli", "doctor", "--json"],
        cwd=ROOT / "plugin",
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert all(finding["verdict"] != "missing" for finding in json.loads(result.stdout))


def test_a_case_on_each_gpu(tmp_path: Path) -> None:
    which = ["--vram-sweep=smoke", "-k", "stable-diffusion-v1-5", "--vram-batch-sizes=1,2"]
    given = [sys.executable, "-m", "pytest", "bench", "--gpu", *which, "--vram-rounds=5", NO_NEED]
    found = []
    for more in ("-n0", "-nauto"):
        results = tmp_path / more
        ran = subprocess.run(
            [*given, more, f"--vram-results={results}"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        found.append(only_run(results))
    one, several = found
    assert several.complete
    assert [record.id for record in several.records] == [record.id for record in one.records]
    gpus = visible_gpus(None) or []
    if len(gpus) > 1:
        parts = several.environment["merged"]
        assert len({part["gpu_uuid"] for part in parts}) == len(parts) == min(len(gpus), len(one.records))
    for alone, beside in zip(one.records, several.records, strict=True):
        assert beside.memory.allocated_peak_bytes == alone.memory.allocated_peak_bytes
        assert beside.memory.estimated_need_bytes == alone.memory.estimated_need_bytes
        assert beside.exact == alone.exact
