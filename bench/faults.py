"""Runs a sweep undisturbed, then with faults at random places, and checks that nothing else is lost or changed.

python bench/faults.py -- bench --gpu --vram-sweep=smoke
python bench/faults.py -- bench --vram-device=cpu --vram-matrix=tests/matrix.toml

What follows `--` is for pytest. Each fault hits the worker that runs, or the fork server; with a GPU the pipelines of
bench/poisoned.py follow. Then the sweep is gone on with, pytest itself is killed in the middle of a case, the last line
of the journal is torn as by a loss of power, and the sweep is gone on with to its end.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "plugin"))

from pytest_vram.cases.thresholds import Limits
from pytest_vram.compare.comparing import compare
from pytest_vram.compare.finding import read_one
from pytest_vram.measure.locking import visible_gpus
from pytest_vram.measure.worker import die_with_parent
from pytest_vram.records.files import read_journal
from pytest_vram.records.reading import ReadRun
from pytest_vram.records.resuming import is_done
from pytest_vram.records.schema import Record

ROOT = Path(__file__).parents[1]
POISONED = Path(__file__).with_name("poisoned.py")
MIB = 1 << 20
KINDS = {
    "kill": ("worker", signal.SIGKILL),
    "segv": ("worker", signal.SIGSEGV),
    "hang": ("worker", signal.SIGSTOP),
    "server": ("fork server", signal.SIGKILL),
}
GONE_S = 10.0  # until the driver has freed what the last worker held
LOOK_S = 0.05


@dataclass
class Fault:
    """What is done to which case, by its place in the sweep, and after how many seconds; and when it was done."""

    kind: str
    case: int
    after_s: float
    done: str = ""


@dataclass
class Sweep:
    """pytest at work in a folder of results, and every process that it was seen to have."""

    options: list[str]
    results: Path
    seen: set[psutil.Process] = field(default_factory=set)

    def start(self, *more: str) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--vram-results={self.results}"]
        self.log = (self.results.parent / f"{self.results.name}.log").open("a")
        command += [*self.options, *more]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdout=self.log, stderr=subprocess.STDOUT, preexec_fn=die_with_parent
        )

    def watch(self) -> Iterator[tuple[int, psutil.Process | None, psutil.Process | None]]:
        """While pytest runs: how many records there are, the fork server, and the worker that runs."""
        while self.process.poll() is None:
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))
                servers = [
                    p for p in psutil.Process(self.process.pid).children() if "forkserver" in " ".join(p.cmdline())
                ]
                workers = [p for server in servers for p in server.children() if os.getsid(p.pid) == p.pid]
                newest = max(workers, key=lambda p: p.create_time(), default=None)
                yield self.records(), next(iter(servers), None), newest
            time.sleep(LOOK_S)

    def records(self) -> int:
        """How many lines of records the journal has; 0 before there is one."""
        found = self.files("*.jsonl")
        return max(0, found[0].read_bytes().count(b"\n") - 1) if found else 0

    def files(self, pattern: str) -> list[Path]:
        return sorted(self.results.glob(f"*/{pattern}"))

    def run(self) -> ReadRun:
        (path,) = self.files("*.json")
        return read_one(path)

    def end(self) -> int:
        for _ in self.watch():
            pass
        self.log.close()
        return self.process.returncode


def plan(records: list[Record], kinds: list[str], number: int, seed: int) -> list[Fault]:
    """So many faults, each in a case of its own, at a random moment of it."""
    chance = random.Random(seed)
    ran = [place for place, record in enumerate(records) if record.status == "ok" and record.wall]
    places = sorted(chance.sample(ran, min(number, len(ran))))
    order = [kinds[n % len(kinds)] for n in range(len(places))]
    chance.shuffle(order)
    walls = [records[place].wall for place in places]
    moments = [chance.uniform(0.05, 0.95) * wall.total_s for wall in walls if wall]
    return [Fault(*each) for each in zip(order, places, moments, strict=True)]


def disturb(sweep: Sweep, faults: list[Fault]) -> None:
    """Do it all while the sweep runs; a case that was over too soon passes its fault on to the next."""
    waiting = list(faults)
    began: dict[int, float] = {}
    for records, server, worker in sweep.watch():
        if not waiting or worker is None or server is None:
            continue
        fault = waiting[0]
        fault.case = max(fault.case, records)
        if records < fault.case:
            continue
        since_s = time.monotonic() - began.setdefault(records, time.monotonic())
        if since_s < fault.after_s:
            continue
        whom, number = KINDS[fault.kind]
        with contextlib.suppress(psutil.Error):
            (worker if whom == "worker" else server).send_signal(number)
            fault.done = f"{number.name} to the {whom} after {since_s:.1f} s"
            waiting.pop(0)


def kill_pytest(sweep: Sweep, known: int) -> str:
    """As a machine that loses power: pytest is killed while a worker runs, and the journal's last line is half."""
    for records, _, worker in sweep.watch():
        if worker is not None and records >= known and time.time() - worker.create_time() > 0.5:
            sweep.process.kill()
    sweep.log.close()
    for journal in sweep.files("*.jsonl"):
        with journal.open("ab") as file:
            file.write(journal.read_bytes().splitlines()[-1][:100])
        return f"{len(read_journal(journal).records)} records in the journal"
    return "it was over before"


def became(record: Record | None) -> str:
    """What a person reads of the record of a case that was hit."""
    if record is None:
        return "no record"
    reason = record.failure.message if record.failure else record.unavailable.get("memory.need_bytes", "")
    without = "" if record.failure or record.memory.need_bytes or is_done(record) else "no need: "
    said = f"{without}{reason}" if record.failure or without else ""
    return ": ".join(filter(None, [record.status, said[:110], record.disturbed and f"disturbed: {record.disturbed}"]))


def differences(base: ReadRun, head: ReadRun, ids: set[str]) -> list[str]:
    """What of these cases is not as it was in the undisturbed run."""
    before, now = ({record.id: record for record in run.records} for run in (base, head))
    found = []
    for name in sorted(ids):
        old, new = before[name].memory, now[name].memory if name in now else None
        if new is None or before[name].status != now[name].status:
            found.append(f"{name}: {before[name].status}, then {became(now.get(name))}")
        elif old.allocated_peak_bytes != new.allocated_peak_bytes:
            found.append(f"{name}: allocated {old.allocated_peak_bytes}, then {new.allocated_peak_bytes}")
        elif (old.need_bytes is None) != (new.need_bytes is None):
            found.append(f"{name}: need {old.need_bytes}, then {new.need_bytes}: {became(now[name])}")
        elif old.need_bytes and new.need_bytes:
            allowed = (old.need_tolerance_bytes or 0) + (new.need_tolerance_bytes or 0)
            if abs(old.need_bytes - new.need_bytes) > allowed:
                found.append(f"{name}: need {old.need_bytes >> 20}, then {new.need_bytes >> 20} MiB")
    for case in compare(base, head, Limits()).cases:
        slower = [c for c in case.changes if c.metric.startswith("time.") and c.verdict == "worse"]
        found += [f"{case.id}: {c.metric} {c.base} s, then {c.head} s" for c in slower if case.id in ids]
    return found


def used() -> list[int]:
    """Bytes in use on each GPU that CUDA uses; none without NVML."""
    return [gpu.used_bytes() or 0 for gpu in visible_gpus(None) or []]


def left_over(seen: set[psutil.Process], idle: list[int]) -> list[str]:
    """Processes that still run, and GPU memory that is still held."""
    deadline = time.monotonic() + GONE_S
    while True:
        running = [p for p in seen if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        held = [(now - before) >> 20 for before, now in zip(idle, used(), strict=True)]
        found = [f"process {p.pid} still runs" for p in running]
        found += [f"a GPU holds {more} MiB more than before" for more in held if more > 1]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=4, help="how many; default: 4")
    parser.add_argument("--seed", type=int, default=0, help="of where they strike; default: 0")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--output", type=Path, help="where results and pytest's output go; default: a temporary folder")
    parser.add_argument("options", nargs="+", help="for pytest, after --")
    given = parser.parse_args()
    folder = given.output or Path(tempfile.mkdtemp(prefix="faults-"))
    folder.mkdir(parents=True, exist_ok=True)
    idle = used()

    undisturbed = Sweep(given.options, folder / "undisturbed")
    undisturbed.start()
    undisturbed.end()
    base = undisturbed.run()
    longest_s = max(record.wall.total_s for record in base.records if record.wall)
    faults = plan(base.records, given.kinds.split(","), given.faults, given.seed)

    timeout = f"--vram-timeout={round(20 + 3 * longest_s)}"
    disturbed = Sweep([*given.options, timeout], folder / "disturbed")
    disturbed.start()
    disturb(disturbed, faults)
    code = disturbed.end()
    head = disturbed.run()
    records = {record.id: record for record in head.records}
    hit = {base.records[fault.case].id: fault for fault in faults if fault.done}
    table = Table("what was done", "case", "what became of it", title=f"seed {given.seed}, pytest's exit code {code}")
    for name, fault in hit.items():
        table.add_row(fault.done, name, became(records.get(name)))
    poisoned = Sweep([str(POISONED), "--gpu", "--vram-no-need", timeout], folder / "poisoned")
    if base.run.options.get("device") == "cuda":
        poisoned.start()
        poisoned.end()
        for record in poisoned.run().records:
            table.add_row("its own pipeline", record.id.split("::")[-1], became(record))
    Console().print(table)
    others = {record.id for record in base.records} - hit.keys()
    problems = differences(base, head, others)
    print(f"{len(others)} other cases: {len(problems)} differ; the file has {len(head.records)} records")

    disturbed.start("--vram-resume")
    done = sum(is_done(record) for record in head.records)
    print(f"resumed, and pytest killed: {kill_pytest(disturbed, done)}")
    disturbed.start("--vram-resume")
    print(f"resumed to the end: exit code {disturbed.end()}, journals left: {len(disturbed.files('*.jsonl'))}")
    problems += [f"at the end: {text}" for text in differences(base, disturbed.run(), {r.id for r in base.records})]
    problems += [f"never done: {fault}" for fault in faults if not fault.done]
    problems += left_over(undisturbed.seen | disturbed.seen | poisoned.seen, idle)
    print("\n".join(problems) or f"nothing else was lost or changed, and nothing is left over; {folder}")
    raise SystemExit(bool(problems))


if __name__ == "__main__":
    main()
