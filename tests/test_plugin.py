"""The plugin as people meet it: pytest is run on a project of one test, with tiny models on the CPU and on meta."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from pytest_vram.cases.case import Case
from pytest_vram.plugin import Manager
from pytest_vram.records.files import read_journal, read_run
from pytest_vram.records.schema import Record, Run
from tests.warm import warm_forkserver

HERE = Path(__file__).parent
WARM = HERE / "warm"
TEST = "def test_generation(vram_case):\n    vram_case.run()\n"
PATIENCE_S = 60.0


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project with the tiny model, its matrix, and one test."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent / "plugin"), str(WARM)]))
    for name, value in warm_forkserver.environ().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # beside other work, threads that wait for each other take minutes
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    (pytester.path / "models").mkdir()
    (pytester.path / "models" / "tiny-sd.toml").write_text((HERE / "models" / "tiny-sd.toml").read_text())
    (pytester.path / "matrix.toml").write_text((HERE / "matrix.toml").read_text())
    pytester.makepyfile(test_it=TEST)
    return pytester


def command(*options: str) -> list[str]:
    left_out = [f"-pno:{plugin}" for plugin in ("cacheprovider", "hypothesispytest", "anyio")]  # long to import
    return [sys.executable, "-m", "pytest", "-p", "pytest_vram.plugin", *left_out, *options]


def run(project: pytest.Pytester, *options: str) -> pytest.RunResult:
    """pytest with these options: in this process, but where it starts xdist workers."""
    if "-n" in options:
        return project.run(*command(*options))
    with as_if_started():
        return project.runpytest_inprocess(*command(*options)[3:])


@contextlib.contextmanager
def as_if_started() -> Iterator[None]:
    """What a process of its own would have: its path, and nothing that warns as an error does here."""
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.resetwarnings()
        patch.syspath_prepend(WARM)
        yield


def run_of(project: pytest.Pytester, folder: str = "*") -> Run:
    """The one run file that was written."""
    (path,) = (project.path / "results").glob(f"{folder}/*.json")
    return read_run(path)


def by_id(run: Run) -> dict[str, Record]:
    return {record.id.removeprefix("tiny-sd/"): record for record in run.records}


BAD_INPUT = [
    (["--vram-models=tiny-ds"], "--vram-models: unknown model 'tiny-ds'; did you mean 'tiny-sd'?"),
    (
        ["--vram-optimizations=fp32+vae_tilling"],
        "--vram-optimizations: unknown optimization 'vae_tilling'; did you mean",
    ),
    (["--vram-optimizations=fp32+fp16"], "exactly one of fp32, fp16, bf16, and has fp32 and fp16"),
    (["--vram-models=,"], "--vram-models: is empty"),
    (["--vram-leak-check=20"], "--vram-leak-check: nothing is run for an estimate; give --gpu, or leave it out"),
    (["--vram-leak-check=2", "--vram-device=cpu"], "--vram-leak-check: 2 calls say nothing; give 3 to 10000"),
    (["--vram-optimizations=vae_tiling"], "exactly one of fp32, fp16, bf16, and has none"),
    (["--vram-resolutions=33"], "--vram-resolutions: tiny-sd takes multiples of 2 pixels, not 33x33"),
    (["--vram-resolutions=big"], "--vram-resolutions: 'big' is not a resolution"),
    (["--vram-batch-sizes=0"], "--vram-batch-sizes: '0' is not a whole number of 1 or more"),
    (["--vram-steps=few"], "--vram-steps: 'few' is not a whole number of 1 or more"),
    (["--vram-limit=8"], "--vram-limit: '8' is not a size"),
    (["--vram-sweep=smok"], "matrix.toml: sweeps: unknown sweep 'smok'"),
    (["--vram-matrix=nowhere.toml"], "nowhere.toml: "),
    (["--vram-resume"], "--vram-resume: no unfinished run in "),
    (["--vram-results=matrix.toml/x"], "--vram-results: "),
    (["--vram-models=./nowhere", "--vram-weights=pretrained"], "nowhere/model_index.json: "),
    (["--vram-models=./nowhere"], "nowhere/model_index.json: "),
    (["--vram-frames=9"], "--vram-frames: tiny-sd: makes images; leave frames out"),
]


@pytest.mark.parametrize(("options", "message"), BAD_INPUT, ids=[" ".join(options) for options, _ in BAD_INPUT])
def test_bad_input_is_one_line_and_exit_code_4(project: pytest.Pytester, options: list[str], message: str) -> None:
    result = run(project, *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    errors = [line for line in (*result.outlines, *result.errlines) if line.startswith("ERROR")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not list(project.path.glob("results/*/*"))


def test_a_malformed_matrix_names_file_and_key(project: pytest.Pytester) -> None:
    (project.path / "matrix.toml").write_text(
        "[sweeps.default.blocks.a]\nmodels = ['tiny-sd']\noptimisations = ['fp32']\n"
    )
    result = run(project)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "matrix.toml: sweeps.default.blocks.a.optimi" in str(result.stderr)


def test_no_gpu_is_said_at_once(project: pytest.Pytester) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    result = run(project, "--vram-device=cuda")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "--gpu: no NVIDIA driver answers" in str(result.stderr)


def test_a_sweep_on_the_cpu(project: pytest.Pytester) -> None:
    options = ["--vram-device=cpu", "--vram-rounds=5", "--vram-save-images=images", "--benchmark-json=bench.json"]
    optimizations = "--vram-optimizations=fp32,fp32+vae_slicing,fp32+model_offload"
    result = run(project, *options, optimizations, "--vram-batch-sizes=2", "-rs")
    result.assert_outcomes(passed=2, skipped=1)
    found = run_of(project, "cpu")
    assert found.complete
    assert found.aliases == {"tiny-sd": ["tiny"]}
    records = by_id(found)
    plain = records["fp32/32x32/b2"]
    assert plain.status == "ok"
    assert len(plain.time.workers[0].rounds_s) == 5
    assert plain.memory.allocated_peak_bytes is None
    assert "RSS" in plain.unavailable["memory.allocated_peak_bytes"]
    assert (plain.memory.host_peak_bytes or 0) > 50 << 20
    assert records["fp32+vae_slicing/32x32/b2"].effects["vae_slicing"] == "applied"
    skipped = records["fp32+model_offload/32x32/b2"]
    assert (skipped.status, skipped.reason) == ("skipped", "model_offload needs a GPU")
    time = plain.time
    phases = {name: cost.time_s or 0.0 for name, cost in plain.phases.items()}
    # PNDM calls the denoiser once more than it has steps; the model's own number of steps is 3
    more = 4 - (time.denoiser_calls or 0)
    assert time.full_length_s == pytest.approx(sum(phases.values()) - phases["load"] + more * (time.step_s or 0.0))
    assert 0 < (time.first_step_s or 0.0) < phases["denoise"]
    assert {path.name for path in (project.path / "images").iterdir()} == {
        f"tiny-sd_{flags}_32x32_b2_{number}.png" for flags in ("fp32", "fp32+vae_slicing") for number in (0, 1)
    }
    text = str(result.stdout)
    assert "1/3 tiny-sd/fp32/32x32/b2: ok" in text
    assert "tiny-sd (tiny)" in text
    replayed = json.loads((project.path / "bench.json").read_text())["benchmarks"][0]
    assert replayed["stats"]["data"] == pytest.approx(plain.time.workers[0].rounds_s)
    assert replayed["options"]["timer"] == "device_time"


def test_estimates_and_a_limit_that_is_too_low(project: pytest.Pytester) -> None:
    result = run(project, "--vram-limit=900MiB", "--vram-batch-sizes=1,512", "--vram-optimizations=fp32", "-v")
    assert result.ret == pytest.ExitCode.OK
    result.stdout.fnmatch_lines(["*b1* PASSED*", "*b512* OOM*", "*1 passed, 1 oom*"])
    records = list(run_of(project, "estimated").records)
    assert [(record.status, record.method) for record in records] == [("ok", "estimated"), ("oom", "estimated")]
    fits = records[0].memory
    assert fits.need_bytes == fits.estimated_need_bytes
    assert fits.required_bytes == (fits.need_bytes or 0) + (768 << 20)
    assert fits.context_bytes is None
    assert records[1].failure is not None
    assert records[1].failure.limit_bytes == 900 << 20


MARKED = """
import pytest

@pytest.mark.vram(max_required="8GiB")
def test_fits(vram_case):
    assert vram_case.run().memory.required_bytes <= 8 << 30

@pytest.mark.vram(max_required="769MiB")
def test_above(vram_case):
    vram_case.run()

@pytest.mark.vram
def test_bare(vram_case):
    vram_case.run()

@pytest.mark.vram("8GiB")
def test_without_the_name(vram_case):
    vram_case.run()

@pytest.mark.vram(max_required="8GiB", min_required="1GiB")
def test_one_too_many(vram_case):
    vram_case.run()

@pytest.mark.vram(max_required=8)
def test_no_size(vram_case):
    vram_case.run()
"""


def test_the_marker_judges_what_a_case_requires(project: pytest.Pytester) -> None:
    project.makepyfile(test_it=MARKED)
    result = run(project, "--vram-batch-sizes=1", "--vram-optimizations=fp32", "--strict-markers")
    result.assert_outcomes(passed=1, failed=5)
    (record,) = run_of(project, "estimated").records
    memory = record.memory
    assert record.status == "ok", "a record is kept whatever the test says of it"
    need = f"{(memory.need_bytes or 0) / 2**30:.2f}"
    required = f"{(memory.required_bytes or 0) / 2**30:.2f}"
    id = "tiny-sd/fp32/32x32/b1"
    argument = 'takes one argument, such as max_required="8GiB"'
    text = str(result.stdout)
    assert f"{id}: required {required} GiB (need {need} + context 0.75); max_required is 0.75 GiB; " in text
    assert text.count(f"\n@pytest.mark.vram: {argument}") == 3
    assert "@pytest.mark.vram: max_required: '8' is not a size; write it like 8GiB or 500MiB" in text


def test_estimates_under_xdist_make_one_run_file(project: pytest.Pytester) -> None:
    result = run(project, "-n", "2")
    assert result.ret == pytest.ExitCode.OK
    assert len(run_of(project, "estimated").records) == 4
    refused = run(project, "-n", "2", "--vram-device=cpu")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: -n: without GPUs cases are run, resumed, compared one at a time; leave -n out" in str(refused.stderr)


def test_a_record_is_asked_for_once_and_an_alias_selects(project: pytest.Pytester) -> None:
    result = run(project, "--collect-only", "-q", "-k", "tiny and b2", "--vram-models=tiny,tiny-sd")
    assert [line for line in result.outlines if "::" in line] == [
        "test_it.py::test_generation[tiny-sd/fp32/32x32/b2]",
        "test_it.py::test_generation[tiny-sd/fp32+vae_slicing/32x32/b2]",
    ]


def test_a_project_that_has_its_own_names_runs_untouched(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent / "plugin"))
    pytester.makeini("[pytest]\nmarkers =\n    gpu: theirs\naddopts = --strict-markers\n")
    pytester.makeconftest(
        """
        import pytest

        def pytest_addoption(parser):
            parser.addoption("--gpu", action="store_true")

        @pytest.fixture(params=[1, 2])
        def case(request):
            return request.param
        """
    )
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.gpu
        def test_theirs(case, request):
            assert case in (1, 2) and request.config.getoption("--gpu")
        """
    )
    result = pytester.run(*command("--gpu", "-W", "error"))
    result.assert_outcomes(passed=2)
    assert not (pytester.path / "results").exists()


# What happens when something dies


@pytest.fixture
def started(project: pytest.Pytester) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts pytest on the project in the background, with a fork server of its own."""
    processes = []
    folder = project.mkdir("temporary")

    def start(*options: str) -> "subprocess.Popen[str]":
        arguments = command("--vram-device=cpu", "--vram-rounds=10", "--vram-optimizations=fp32", *options)
        process = subprocess.Popen(
            arguments,
            cwd=project.path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**{n: value for n, value in os.environ.items() if n != "PYTEST_PLUGINS"}, "TMPDIR": str(folder)},
            # a shell's background jobs ignore Ctrl-C, and what they start does too
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(what: Callable[[], Any]) -> Any:
    """What `what` gives once it gives something."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := what()):
        assert time.monotonic() < deadline, "nothing came of it"
        time.sleep(0.02)
    return found


def journal_with(project: pytest.Pytester, records: int) -> Callable[[], Path | None]:
    def look() -> Path | None:
        paths = list((project.path / "results" / "cpu").glob("*.jsonl"))
        return paths[0] if paths and len(read_journal(paths[0]).records) >= records else None

    return look


def descendants(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def worker_of(process: "subprocess.Popen[str]") -> psutil.Process | None:
    """The worker: the child of the fork server that leads a session of its own."""
    with contextlib.suppress(psutil.Error, ProcessLookupError):
        for server in psutil.Process(process.pid).children():
            for child in server.children():
                if os.getsid(child.pid) == child.pid:
                    return child
    return None


def all_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=3)
    assert not alive


def test_ctrl_c_finishes_the_file_and_resume_goes_on(
    project: pytest.Pytester, started: Callable[..., "subprocess.Popen[str]"]
) -> None:
    process = started()
    wait_for(journal_with(project, 1))
    wait_for(lambda: worker_of(process))
    processes = descendants(process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == pytest.ExitCode.INTERRUPTED
    all_gone(processes)
    first = run_of(project, "cpu")
    assert not first.complete
    assert [record.status for record in first.records] == ["ok", "error"]
    assert first.records[1].failure is not None
    assert first.records[1].failure.message == "interrupted"
    assert "run file: " in output

    result = run(project, "--vram-device=cpu", "--vram-optimizations=fp32", "--vram-rounds=10", "--vram-resume")
    result.assert_outcomes(passed=2)
    whole = run_of(project, "cpu")
    assert whole.complete
    assert [record.status for record in whole.records] == ["ok", "ok"]
    assert whole.records[0] == first.records[0]
    assert run(project, "--vram-device=cpu", "--vram-resume").ret == pytest.ExitCode.USAGE_ERROR


def test_killing_pytest_loses_the_case_in_flight_alone(
    project: pytest.Pytester, started: Callable[..., "subprocess.Popen[str]"]
) -> None:
    process = started()
    journal = wait_for(journal_with(project, 1))
    wait_for(lambda: worker_of(process))
    processes = descendants(process)
    process.kill()
    process.wait()
    all_gone(processes)
    assert [record.status for record in read_journal(journal).records] == ["ok"]
    result = run(project, "--vram-device=cpu", "--vram-optimizations=fp32", "--vram-rounds=10", "--vram-resume")
    result.assert_outcomes(passed=2)
    assert run_of(project, "cpu").complete


def test_a_killed_worker_costs_its_own_case(
    project: pytest.Pytester, started: Callable[..., "subprocess.Popen[str]"]
) -> None:
    process = started()
    temporary = project.path / "temporary"
    wait_for(lambda: any(path.is_dir() for path in temporary.glob("pytest-vram-*")))  # once the models are checked
    wait_for(lambda: worker_of(process)).kill()
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == pytest.ExitCode.TESTS_FAILED
    assert "killed by signal 9" in output
    assert [record.status for record in run_of(project, "cpu").records] == ["error", "ok"]


def test_a_test_that_fails_on_an_oom_is_a_failure(project: pytest.Pytester) -> None:
    project.makepyfile(test_it="def test_it(vram_case):\n    assert vram_case.run().status == 'ok'\n")
    result = run(project, "--vram-limit=769MiB", "--vram-batch-sizes=1", "--vram-optimizations=fp32")
    result.assert_outcomes(failed=1)
    assert "assert 'oom' == 'ok'" in str(result.stdout)


def test_two_sweeps_with_the_same_ids_are_refused(project: pytest.Pytester) -> None:
    other = project.mkdir("other")
    for name in ("models", "matrix.toml"):
        (other / name).symlink_to(project.path / name)
    (other / "matrix.toml").unlink()
    (other / "matrix.toml").write_text((HERE / "matrix.toml").read_text().replace("steps = 2", "steps = 3"))
    (other / "test_other.py").write_text(TEST)
    result = run(project)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "have a case tiny-sd/fp32/32x32/b1, with other steps" in str(result.stderr)
    assert not (project.path / "results").exists()


def test_an_error_carries_its_traceback_and_bad_input_under_xdist_its_line(project: pytest.Pytester) -> None:
    model = project.path / "models" / "tiny-sd.toml"
    model.write_text(model.read_text().replace("hidden_size = 32", "hidden_size = 64"))  # not what the UNet takes
    result = run(project, "--vram-device=cpu", "--vram-batch-sizes=1", "--vram-optimizations=fp32")
    result.assert_outcomes(failed=1)
    failure = run_of(project, "cpu").records[0].failure
    assert failure is not None
    assert failure.phase == "denoise"
    assert 'File "<python>' in failure.output_tail
    assert "mat1 and mat2 shapes cannot be multiplied" in failure.output_tail.splitlines()[-1]
    result = run(project, "-n", "1", "--vram-models=tiny-ds")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: --vram-models: unknown model 'tiny-ds'; did you mean 'tiny-sd'?" in str(result.stderr)


def test_trained_weights_from_a_folder(saved: Path, project: pytest.Pytester) -> None:
    shutil.copytree(saved, project.path / "Trained One")
    options = ["--vram-weights=pretrained", "--vram-optimizations=fp32", "--vram-batch-sizes=1"]
    result = run(project, "--vram-models=./Trained One", "--vram-device=cpu", "--vram-rounds=5", *options)
    result.assert_outcomes(passed=1)
    (record,) = run_of(project, "cpu").records
    assert re.fullmatch("trained-one-[0-9a-f]{8}/fp32/32x32/b1", record.id)
    assert isinstance(record.case, Case)
    assert record.case.weights == "pretrained"
    (project.path / "Trained One" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    refused = run(project, "--vram-models=./Trained One", *options)
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    assert "Trained One/vae: no .safetensors file" in str(refused.stderr)


class Terminal:
    """A terminal reporter that remembers its lines."""

    isatty = False

    def __init__(self) -> None:
        self.lines: list[str] = []

    def section(self, title: str) -> None:
        self.lines.append(title)

    def ensure_newline(self) -> None:
        pass

    def write_line(self, text: str, **_: Any) -> None:
        self.lines.append(text)


def manager_on(terminal: Terminal | None, **session: Any) -> Manager:
    manager: Any = object.__new__(Manager)
    plugins = SimpleNamespace(getplugin={"terminalreporter": terminal, "capturemanager": None}.get)
    manager.config = SimpleNamespace(pluginmanager=plugins, get_verbosity=lambda: 0)
    manager.session, manager.problem = SimpleNamespace(**session) if session else None, None
    manager.told, manager.controller = 0, None
    found: Manager = manager
    return found


def test_a_line_that_stays_is_shown_where_there_is_no_terminal_to_rewrite_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    terminal = Terminal()
    manager_on(terminal).tell("waiting for pid 5: another sweep measures on this GPU")
    assert terminal.lines == ["vram: waiting for pid 5: another sweep measures on this GPU"]
    manager_on(None).tell("an xdist worker waits")
    assert capsys.readouterr().err == "vram: an xdist worker waits\n"


def test_memory_that_means_something_else_is_said_under_the_table() -> None:
    environment = {"unified_memory": True}
    facts: dict[str, Any] = {
        "options": SimpleNamespace(device="meta"),
        "unsaved": None,
        "comparison": None,
        "notes": [],
    }
    for found, times in ((environment, 1), ({}, 0)):
        terminal, run = Terminal(), Run(environment=found, sweep="default")
        written = SimpleNamespace(run=run, records=run.records, path="run.json")
        manager_on(terminal, written=[written], **facts).pytest_terminal_summary(terminal)
        assert sum(line.startswith("vram: GPU and host share one memory: ") for line in terminal.lines) == times
