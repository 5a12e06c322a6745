"""Two sweeps on one GPU queue: locks by uuid, in a folder of their own here."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from pytest_vram.measure import locking, nvml
from pytest_vram.measure.locking import ALL, Locks, NotLocked, chosen_gpus, lock_gpus, visible_gpus

PLUGIN = str(Path(locking.__file__).parents[2])
# A sweep that holds the lock of GPU-a in a folder, and says so; then it does what it is told.
SWEEP = """
import sys, time
from pathlib import Path
sys.path.insert(0, {plugin!r})
from pytest_vram.measure import locking, nvml
class Gpu(nvml.Gpu):
    def __init__(self): self.name = "a GPU"
    def uuid(self): return "GPU-a"
    def whole(self): return None
def say(text): print(text, flush=True)
try:
    locks = locking.lock_gpus([Gpu()], say, Path(sys.argv[1]))
    print("locked", flush=True)
    {then}
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


class Named(nvml.Gpu):
    """A GPU that has a uuid and nothing else."""

    def __init__(self, uuid: str | None, name: str = "one model", part_of: "Named | None" = None) -> None:
        self._uuid, self.name, self._whole = uuid, name, part_of

    def uuid(self) -> str | None:
        return self._uuid

    def whole(self) -> nvml.Gpu | None:
        return self._whole


A, B = Named("GPU-a"), Named("GPU-b")


class Sweep:
    """Another process with the lock of GPU-a, or on its way to it."""

    def __init__(self, folder: Path, then: str = "time.sleep(60)", first: str = "") -> None:
        code = SWEEP.format(plugin=PLUGIN, then=then)
        command = [sys.executable, "-c", code, str(folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        self.said = self.line()

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


Start = Callable[..., Sweep]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    sweeps: list[Sweep] = []

    def started(then: str = "time.sleep(60)") -> Sweep:
        sweeps.append(Sweep(tmp_path, then))
        return sweeps[-1]

    yield started
    for sweep in sweeps:
        sweep.end()


NO_GPUS: list[nvml.Gpu] = []


def is_free(name: str, folder: Path) -> bool:
    fd = os.open(folder / f"pytest-vram-{name}.lock", os.O_RDWR)
    try:
        return locking._lock(fd, False)
    finally:
        os.close(fd)


def lock(folder: Path, *gpus: Named) -> Locks:
    return lock_gpus(gpus, lambda text: pytest.fail(text), folder)


def test_each_gpu_has_a_lock_that_names_its_holder_and_ends_with_it(tmp_path: Path) -> None:
    locks = lock(tmp_path, B, A)
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["pytest-vram-GPU-a.lock", "pytest-vram-GPU-b.lock"]
    assert [file.read_text().split()[0] for file in files] == [str(os.getpid())] * 2
    assert [file.stat().st_mode & 0o777 for file in files] == [0o666] * 2  # other users lock them too
    assert locks.cover(["a", "b"])
    assert not locks.cover(["a", "c"])
    assert not is_free("GPU-a", tmp_path)
    locks.close()
    locks.close()
    assert is_free("GPU-a", tmp_path)


def test_gpus_that_nvml_does_not_know_have_one_lock(tmp_path: Path) -> None:
    for gpus in (None, NO_GPUS):
        locks = lock_gpus(gpus, print, tmp_path)
        assert not is_free(ALL, tmp_path)
        assert locks.cover(["whatever"])
        locks.close()


def test_the_second_sweep_waits_and_says_for_whom(tmp_path: Path, start: Start) -> None:
    first = start()
    assert first.said == "locked"
    said: list[str] = []
    locked: list[Locks] = []
    thread = threading.Thread(target=lambda: locked.append(lock_gpus([A], said.append, tmp_path)))
    thread.start()
    time.sleep(3 * locking.POLL_S)
    assert not locked
    assert said == [f"waiting for pid {first.process.pid}: another sweep measures on this GPU"]  # once
    os.kill(first.process.pid, signal.SIGKILL)  # what dies without a word holds nothing
    thread.join(5)
    assert locked
    assert len(said) == 1
    locked[0].close()


def test_a_holder_that_has_not_written_its_name_is_waited_for_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locking, "POLL_S", 0.01)
    monkeypatch.setattr(locking, "NAMELESS_S", 0.05)
    first = lock(tmp_path, Named("MIG-1", part_of=A))  # shares the lock of its GPU, which names nobody
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        first.close()

    lock_gpus([A], say, tmp_path).close()
    assert said == ["waiting for a process: another sweep measures on this GPU"]


def test_ctrl_c_ends_the_wait(tmp_path: Path, start: Start) -> None:
    locks = lock(tmp_path, A)
    # not a child of this process, which would be a part of this sweep
    code = SWEEP.format(plugin=PLUGIN, then="pass")
    (tmp_path / "sweep.py").write_text(code)
    shell = f"{sys.executable} {tmp_path}/sweep.py {tmp_path} > {tmp_path}/said 2>&1 & echo $!"
    pid = int(subprocess.run(["bash", "-c", f"set -m; {shell}"], capture_output=True, text=True, check=True).stdout)
    said = tmp_path / "said"
    for moment in ("waiting for pid", "interrupted"):
        deadline = time.monotonic() + 10
        while not (said.exists() and moment in said.read_text()):
            assert time.monotonic() < deadline, said.read_text()
            time.sleep(0.02)
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGINT)
    assert "Traceback" not in said.read_text()
    locks.close()


def test_a_sweep_within_a_sweep_does_not_wait_for_it(tmp_path: Path, start: Start) -> None:
    locks = lock(tmp_path, A)
    inner = start("locks.close()")  # as where times are measured again, a child of this process
    assert inner.said == "locked"
    inner.process.wait(10)
    assert not is_free("GPU-a", tmp_path)  # and takes nothing away
    again = lock(tmp_path, A)
    again.close()
    assert not is_free("GPU-a", tmp_path)
    locks.close()


@pytest.mark.parametrize("child", ["os.fork()", "subprocess.Popen(['sleep', '60'], close_fds=False).pid"])
def test_no_child_holds_the_lock_when_its_parent_is_gone(tmp_path: Path, start: Start, child: str) -> None:
    sweep = start(f"import os, subprocess; pid = {child}; print(pid, flush=True) if pid else time.sleep(60)")
    orphan = int(sweep.line())
    try:
        sweep.process.wait(10)
        deadline = time.monotonic() + 5
        while not is_free("GPU-a", tmp_path):  # a forked child closes its files once it runs
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert psutil.pid_exists(orphan)
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_a_dead_holder_is_named_by_nobody(tmp_path: Path) -> None:
    path = tmp_path / "pytest-vram-GPU-a.lock"
    for content in (f"{os.getpid()} 12.0", "1", "", "x y", f"{2**22 + 1} 12.0"):  # another began under that pid
        path.write_text(content)
        fd = os.open(path, os.O_RDWR)
        assert locking._holder(fd) is None
        os.close(fd)
    lock(tmp_path, A).close()


def test_instances_of_one_gpu_share_it_and_not_themselves(tmp_path: Path) -> None:
    first, second = (Named(f"MIG-{number}", part_of=A) for number in (1, 2))
    one = lock(tmp_path, first)
    assert not is_free("MIG-1", tmp_path)
    other = lock(tmp_path, second)
    assert not is_free("GPU-a", tmp_path)  # for one that wants all of it
    one.close()
    other.close()
    assert is_free("GPU-a", tmp_path)


@pytest.mark.parametrize("what", ["no folder", "a link", "a pipe"])
def test_where_there_can_be_no_lock_it_is_said(tmp_path: Path, what: str) -> None:
    path = tmp_path / "pytest-vram-GPU-a.lock"
    if what == "a link":
        path.symlink_to(tmp_path / "elsewhere")
    elif what == "a pipe":
        os.mkfifo(path)
    with pytest.raises(NotLocked, match=r"pytest-vram-GPU-a\.lock"):
        lock(tmp_path / "none" if what == "no folder" else tmp_path, A)
    assert not (tmp_path / "elsewhere").exists()


# Which GPUs


GPUS = [Named("GPU-a1"), Named("GPU-b2"), Named("GPU-c3")]
MIXED = [Named("GPU-a1", "slow"), Named("GPU-b2", "fast")]


@pytest.mark.parametrize(
    ("visible", "count", "chosen"),
    [
        (None, None, [0, 1, 2]),
        (None, 1, [0]),
        ("1", None, [1]),
        ("2, 0", 1, [2]),
        ("GPU-b2", None, [1]),
        ("GPU-c,GPU-a", None, [2, 0]),
        ("", None, []),
        ("1,-1,2", None, [1]),  # CUDA stops at what it does not know
        ("7", None, []),
        ("GPU-x,0", None, []),
    ],
)
def test_the_gpus_that_cuda_uses(visible: str | None, count: int | None, chosen: Sequence[int]) -> None:
    assert chosen_gpus(GPUS, visible, count) == [GPUS[number] for number in chosen]


@pytest.mark.parametrize("visible", [None, "1"])
def test_among_different_gpus_a_position_may_be_any(visible: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    assert chosen_gpus(MIXED, visible, 1) == MIXED
    assert chosen_gpus(MIXED, "GPU-b2", 1) == MIXED[1:]
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert chosen_gpus(MIXED, visible, 1) == [MIXED[int(visible or 0)]]


def test_visible_gpus_are_nvmls(monkeypatch: pytest.MonkeyPatch) -> None:
    instance = Named("MIG-1")
    monkeypatch.setattr(nvml, "gpus", lambda: GPUS)
    monkeypatch.setattr(nvml, "gpu_by_uuid", lambda uuid: instance)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    assert visible_gpus(None) == [instance]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus(2) == GPUS[:2]

    def none() -> list[nvml.Gpu]:
        raise nvml.NvmlUnavailable("no driver")

    monkeypatch.setattr(nvml, "gpus", none)
    assert visible_gpus(2) is None
