"""A sweep on several GPUs: pytest-xdist's controller gives each xdist worker one GPU, and joins what they found."""

from __future__ import annotations

import os
import secrets
import time
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_vram.exchange import Part, Planned
    from pytest_vram.records.schema import Record
    from pytest_vram.session import SweepSession

INPUT = "vram"  # what an xdist worker is told, by this key


def measures_on_gpus(config: pytest.Config) -> bool:
    """Whether pytest-xdist's workers, if there are any, measure on GPUs."""
    device: str = config.getoption("--vram-device")
    return device == "cuda"


def count_gpus(config: pytest.Config) -> int | None:
    """What `-n auto` means: one xdist worker for each GPU; None where no GPU is asked for."""
    if not measures_on_gpus(config) or config.option.collectonly:
        return None
    return len(_gpus())


def part_of(config: pytest.Config) -> Part | None:
    """The share of this process, where it is one of several xdist workers that measure."""
    told = getattr(config, "workerinput", {}).get(INPUT)
    if told is None:
        return None
    from pytest_vram.exchange import Part

    return Part.read(told)


def _gpus() -> list[str]:
    from pytest_vram.errors import UsageError
    from pytest_vram.measure.visible import visible_uuids

    try:
        gpus = visible_uuids()
    except UsageError as error:
        raise pytest.UsageError(str(error)) from error
    if not gpus:
        raise pytest.UsageError(f"--gpu: CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')} leaves no GPU")
    return gpus


class Controller:
    """Has each xdist worker see one GPU and keep a journal of its own; at the end these become run files.

    The GPU is in the environment in which an xdist worker starts, so that one that replaces another has its GPU.
    """

    def __init__(self, config: pytest.Config, specs: Sequence[Any]) -> None:
        """Raises pytest's UsageError where two would share a GPU."""
        from pytest_vram.exchange import Exchange
        from pytest_vram.interrupting import terminate_as_ctrl_c
        from pytest_vram.records.files import TIME_FORMAT

        self.config = config
        self.gpus = _gpus()
        if (dist := config.option.dist) != "load":
            raise pytest.UsageError(f"--dist {dist}: each case goes to the next GPU that is free; leave --dist out")
        if any(not spec.popen for spec in specs):
            raise pytest.UsageError("--tx: an xdist worker gets one GPU of this machine; give -n auto instead")
        if len(specs) > len(self.gpus):
            there = "there is 1 GPU" if len(self.gpus) == 1 else f"there are {len(self.gpus)} GPUs"
            raise pytest.UsageError(f"-n {len(specs)}: {there}, and each runs one case at a time; give -n auto")
        self.gpus = self.gpus[: len(specs)]
        for spec, gpu in zip(specs, self.gpus, strict=True):
            spec.env["CUDA_VISIBLE_DEVICES"] = gpu
        self._restore = terminate_as_ctrl_c()
        self._folder = TemporaryDirectory(prefix="pytest-vram-", ignore_cleanup_errors=True)
        self.exchange = Exchange(Path(self._folder.name))
        self.planned: list[Planned] = []
        self.first_case_began: float | None = None
        self.told = {
            "folder": self._folder.name,
            "of": len(specs),
            "began": datetime.now(UTC).strftime(TIME_FORMAT),
            "mark": secrets.token_hex(8),
        }

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        number = self.gpus.index(node.gateway.spec.env["CUDA_VISIBLE_DEVICES"])
        node.workerinput[INPUT] = {**self.told, "worker": node.gateway.id, "number": number}

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        from pytest_vram.scheduling import CaseScheduling

        return CaseScheduling(config, log)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self) -> None:
        self.first_case_began = self.first_case_began or time.monotonic()

    def said(self) -> str:
        """On how many GPUs."""
        return "1 GPU" if len(self.gpus) == 1 else f"{len(self.gpus)} GPUs, an xdist worker for each"

    def tell(self, session: SweepSession) -> None:
        """Have the session know what the xdist workers have planned, which collect for it."""
        if session.order:
            return
        self.planned = self.exchange.plans()
        for planned in self.planned:
            session.case_ids |= planned.case_ids
            session.order = list(dict.fromkeys([*session.order, *planned.ids]))
        session.expected = set(session.order)
        session.first_case_began = self.first_case_began or session.began

    def note(self, session: SweepSession, record: Record) -> None:
        """A case has ended; its xdist worker keeps the record."""
        session.note(record, fresh=not any(record.id in planned.known for planned in self.planned))

    def end_workers(self) -> None:
        """Have the xdist workers that still run end, and with them what they write."""
        manager = getattr(self.config.pluginmanager.getplugin("dsession"), "nodemanager", None)
        if manager is not None:
            manager.teardown_nodes()

    def finish(self, session: SweepSession, interrupted: bool) -> str | None:
        """Write the run files, one for each environment, in place of the journals; gives what went wrong with it."""
        from pytest_vram.errors import VramError
        from pytest_vram.records.files import journals_of

        self.tell(session)
        session.spent_s = time.monotonic() - session.began
        problem = None
        paths = self.exchange.runs()
        for path in paths:
            journals = journals_of(path)
            try:
                session.join(path, journals, len(self.gpus), interrupted, only=len(paths) == 1)
            except (VramError, OSError) as error:
                problem = f"{error}; these journals are kept: {', '.join(map(str, journals))}"
        there = {record.id for written in session.written for record in written.run.records}
        if not problem and (lost := session.finished.keys() - there):
            problem = f"no journal had room for {', '.join(sorted(lost))}: free some space and run them again"
        try:
            session.find_base_of_joined()
        except VramError as error:
            problem = problem or str(error)
        return problem

    def close(self) -> None:
        self._restore()
        self._folder.cleanup()


class Claims:
    """In an xdist worker: a test that another one has begun is passed over."""

    def __init__(self, part: Part) -> None:
        self.exchange = part.exchange

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if self.exchange.claim(item.nodeid):
            return None
        # what the test before it has left for this one, the next one may not need
        item.session._setupstate.teardown_exact(nextitem)
        return True
