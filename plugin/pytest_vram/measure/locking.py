"""A lock for each GPU, so that two sweeps of a machine queue and do not measure each other.

A lock is a file in `/tmp`, which all users of a machine share; it is locked by flock(2), so that the kernel frees it
with the process that held it, however that ended. Containers that share a GPU share the locks where they share `/tmp`.
"""

import contextlib
import os
import stat
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import psutil

from pytest_vram.errors import VramError
from pytest_vram.measure import nvml

try:
    import fcntl
except ImportError:  # pragma: no cover  # Windows
    fcntl = None  # type: ignore[assignment]

FOLDER = Path("/tmp")  # not TMPDIR: that differs from one user and job to the next
POLL_S = 0.2
NAMELESS_S = 1.0  # who has just got the lock has not yet written its name; of those that share one nobody does
ALL = "all"  # the lock where it is not known which GPUs there are
SAME_START_S = 2.0  # the clock by which processes tell when they began may be set meanwhile

_open_locks: "weakref.WeakSet[Locks]" = weakref.WeakSet()


class NotLocked(VramError):
    """The GPUs could not be locked; the message says why."""


class Locks:
    """Files that are locked until `close()`, or until this process ends."""

    def __init__(self, folder: Path, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.names: set[str] = set()
        self._fds: list[int] = []
        _open_locks.add(self)

    def close(self) -> None:
        """Let others have the GPUs."""
        self.names.clear()
        fds, self._fds = self._fds, []
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)

    def take(self, name: str, shared: bool) -> None:
        """Lock `name`, after whoever has it now. Ctrl-C ends the wait.

        Raises:
            NotLocked: where there can be no such file.
        """
        fd = _open(self.folder / f"pytest-vram-{name}.lock")
        self._fds.append(fd)
        said, began = "", time.monotonic()
        while not _lock(fd, shared):
            holder = _holder(fd)
            if holder and _is_family(*holder):  # this sweep is a part of that one, which waits for it
                self._fds.remove(fd)
                os.close(fd)
                break
            who = f"pid {holder[0]}" if holder else "a process"
            text = f"waiting for {who}: another sweep measures on this GPU"
            if text != said and (holder or time.monotonic() - began > NAMELESS_S):
                self.say(text)
                said = text
            time.sleep(POLL_S)
        else:
            if not shared:
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()} {psutil.Process().create_time():.2f}\n".encode(), 0)
        self.names.add(name)

    def cover(self, uuids: Iterable[str]) -> bool:
        """Whether the GPUs that CUDA calls by these uuids are locked."""
        return ALL in self.names or all(any(name.endswith(uuid) for name in self.names) for uuid in uuids)


def _forget() -> None:
    """In a child that was forked: an open file there would hold the lock on when its parent has ended."""
    for locks in list(_open_locks):
        locks.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def lock_gpus(gpus: Sequence[nvml.Gpu] | None, say: Callable[[str], None], folder: Path = FOLDER) -> Locks:
    """Lock these GPUs, in the order in which every sweep takes them; None stands for GPUs that NVML does not know.

    A MIG instance has a lock of its own, and shares that of its GPU with other instances. `say` is told for whom it
    waits.

    Raises:
        NotLocked: where that cannot be.
    """
    if fcntl is None:  # pragma: no cover  # Windows
        raise NotLocked("this system has no flock")
    names: dict[str, bool] = {} if gpus else {ALL: False}
    for gpu in gpus or ():
        whole = gpu.whole()
        if whole is not None:
            names.setdefault(whole.uuid() or ALL, True)
        names[gpu.uuid() or ALL] = False
    locks = Locks(folder, say)
    try:
        for name, shared in sorted(names.items()):
            locks.take(name, shared)
    except BaseException:
        locks.close()
        raise
    return locks


def visible_gpus(count: int | None) -> list[nvml.Gpu] | None:
    """The first `count` GPUs that CUDA uses, or all; more where it is not certain which; None without NVML."""
    try:
        return chosen_gpus(nvml.gpus(), os.environ.get("CUDA_VISIBLE_DEVICES"), count)
    except nvml.NvmlUnavailable:
        return None


def chosen_gpus(gpus: Sequence[nvml.Gpu], visible: str | None, count: int | None) -> list[nvml.Gpu]:
    """Of these GPUs, in NVML's order, the first `count` that CUDA uses.

    `visible` is CUDA_VISIBLE_DEVICES: positions, or (beginnings of) uuids, up to the first that is neither. CUDA puts
    the fastest GPU first, so that positions among different GPUs say nothing certain: then all of them are given.
    """
    entries = [str(number) for number in range(len(gpus))] if visible is None else visible.split(",")
    mixed = len({gpu.name for gpu in gpus}) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID"
    chosen: list[nvml.Gpu] = []
    for entry in (entry.strip() for entry in entries):
        if entry.isdecimal():
            if mixed:
                return list(gpus)
            found = list(gpus[int(entry) : int(entry) + 1])
        elif entry.startswith("MIG-"):
            found = []
            with contextlib.suppress(nvml.NvmlUnavailable):
                found = [nvml.gpu_by_uuid(entry)]
        else:
            found = [gpu for gpu in gpus if entry and (gpu.uuid() or "").startswith(entry)][:1]
        if not found:
            break
        chosen += found
    return chosen[:count]


def _open(path: Path) -> int:
    """The file, which all users can lock. The kernel may refuse O_CREAT for a file of somebody else's in a folder like
    /tmp (fs.protected_regular), so one that is there is opened without."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        try:
            try:
                fd = os.open(path, flags)
            except FileNotFoundError:
                fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
                os.fchmod(fd, 0o666)  # whatever the umask
        except FileExistsError:
            continue  # somebody else was faster
        except OSError as error:
            raise NotLocked(f"{path}: {error.strerror}") from error
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
        raise NotLocked(f"{path} is no file")


def _lock(fd: int, shared: bool) -> bool:
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise NotLocked(f"flock: {error.strerror}") from error
    return True


def _holder(fd: int) -> tuple[int, float] | None:
    """Who has the lock, by pid and when that process began, where it has written so."""
    with contextlib.suppress(ValueError, OSError, psutil.Error):
        pid, began_s = os.pread(fd, 40, 0).split()
        if abs(psutil.Process(int(pid)).create_time() - float(began_s)) < SAME_START_S:
            return int(pid), float(began_s)
    return None


def _is_family(pid: int, began_s: float) -> bool:
    """Whether this process is that one, or comes from it."""
    with contextlib.suppress(psutil.Error):
        us = psutil.Process()
        return any(one.pid == pid and abs(one.create_time() - began_s) < SAME_START_S for one in (us, *us.parents()))
    return False
