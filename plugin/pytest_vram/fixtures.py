"""The fixtures `vram_case` and `vram`: what a test measures, and what its record says of the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from pytest_vram.planning import Plan
    from pytest_vram.records.schema import Record
    from pytest_vram.session import SweepSession


class Manager(Protocol):
    """What owns the sweep of a pytest session."""

    session: SweepSession | None

    def own_session(self, node: pytest.Item) -> SweepSession: ...


class VramCase:
    """What the fixture `vram_case` gives a test."""

    def __init__(self, plan: Plan, manager: Manager, request: pytest.FixtureRequest) -> None:
        self.case, self._plan, self._manager, self._request = plan.case, plan, manager, request

    def run(self) -> Record:
        """Measure or estimate the case, as the options say, and give its record.

        An out-of-memory is a result. An error or a timeout fails the test; an impossible case skips it.
        """
        session, limit = self._manager.session, _limit_of(self._request.node)
        assert session is not None
        record = session.run(self._plan)
        self._request.node.stash.setdefault(RECORDS, []).append(record)
        _judge(record, limit, self._request.config)
        replay_rounds(record, self._request)
        return record


class Vram:
    """What the fixture `vram` gives a test."""

    def __init__(self, manager: Manager, request: pytest.FixtureRequest) -> None:
        self._manager, self._request, self._node = manager, request, request.node
        self._measured = 0

    def measure(self, build: Callable[[], Any], call: Callable[[Any], Any]) -> Record:
        """Measure a pipeline of your own in fresh processes: `pipe = build()`, then `call(pipe)` again and again.

        Both must be functions of a module's top level: workers import them anew. The record goes into the run file
        under the test's id. An out-of-memory is a result; an error or a timeout fails the test, as does a required
        memory above that of `@pytest.mark.vram(max_required="8GiB")`.
        """
        from pytest_vram.errors import VramError

        limit = _limit_of(self._node)
        self._measured += 1
        refused = None
        try:
            session = self._manager.own_session(self._node)
            record = session.run_own(self._node.nodeid, self._measured, build, call)
        except VramError as error:
            refused = str(error)
        if refused is not None:
            pytest.fail(refused, pytrace=False)
        self._node.stash.setdefault(RECORDS, []).append(record)
        session.keep(record)  # on the disk before the test goes on
        _judge(record, limit, self._request.config)
        if self._measured == 1:  # pytest-benchmark has room for one a test
            replay_rounds(record, self._request)
        return record


def _limit_of(node: pytest.Item) -> int | None:
    """The bytes that the test's marker allows, if it has one; fails the test where the marker is wrong."""
    from pytest_vram.cases.case import parse_bytes
    from pytest_vram.errors import UsageError

    mark = node.get_closest_marker("vram")
    if mark is None:
        return None
    try:
        if mark.args or mark.kwargs.keys() != {"max_required"}:
            raise UsageError('takes one argument, such as max_required="8GiB"')
        return parse_bytes(str(mark.kwargs["max_required"]), "max_required")
    except UsageError as error:
        wrong = f"@pytest.mark.vram: {error}"
    pytest.fail(wrong, pytrace=False)


def _judge(record: Record, limit: int | None, config: pytest.Config) -> None:
    """Fail or skip the test as its record says."""
    from pytest_vram.report.summary import above_limit

    if record.status in ("error", "timeout"):
        failure = record.failure
        assert failure is not None
        tail = f"\n{failure.output_tail}" if failure.output_tail else ""
        pytest.fail(f"{record.id}: {record.status}: {failure.message}{tail}", pytrace=False)
    if record.status == "skipped":
        pytest.skip(record.reason or "")
    if limit is None:
        return
    if config.getoption("--vram-device") == "cpu":
        pytest.skip("max_required is about the memory of a GPU: give --vram-device cuda")
    if problem := above_limit(record, limit):
        pytest.fail(problem, pytrace=False)


RECORDS = pytest.StashKey[list[Any]]()
_replayed: Iterator[float] | None = None


def device_time() -> float:
    """pytest-benchmark's timer while rounds that were timed on the device are replayed."""
    import time

    return time.perf_counter() if _replayed is None else next(_replayed)


def replay_rounds(record: Record, request: pytest.FixtureRequest) -> None:
    """Give pytest-benchmark the rounds that the worker timed, for its table and histogram."""
    global _replayed
    mark = request.node.get_closest_marker("benchmark")
    if not record.time.workers or mark is None or mark.kwargs.get("timer") is not device_time:
        return
    rounds = [seconds for worker in record.time.workers for seconds in worker.rounds_s]
    benchmark = request.getfixturevalue("benchmark")
    now = 0.0
    times = []
    for seconds in rounds:
        times += [now, now + seconds]
        now += seconds
    _replayed = iter(times)
    try:
        benchmark.pedantic(lambda: None, rounds=len(rounds), iterations=1)
    finally:
        _replayed = None


@pytest.fixture
def vram_case(request: pytest.FixtureRequest) -> VramCase:
    """One case of the sweep; `vram_case.run()` measures it, or estimates it where there is no GPU."""
    manager: Manager = request.config.pluginmanager.getplugin("pytest_vram.manager")
    return VramCase(request.param, manager, request)


@pytest.fixture
def vram(request: pytest.FixtureRequest) -> Vram:
    """Measures a pipeline of your own: `record = vram.measure(build, call)`."""
    manager: Manager = request.config.pluginmanager.getplugin("pytest_vram.manager")
    return Vram(manager, request)
