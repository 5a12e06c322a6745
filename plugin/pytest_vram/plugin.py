"""The hooks of pytest. Nothing heavy is imported before a test asks for `vram_case` or `vram`."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest

from pytest_vram.fixtures import RECORDS, device_time, vram, vram_case
from pytest_vram.options import declare, read

if TYPE_CHECKING:
    from pytest_vram.planning import Plan
    from pytest_vram.records.schema import Record
    from pytest_vram.session import SweepSession

__all__ = ["vram", "vram_case"]  # the fixtures, for pytest to find here


def pytest_addoption(parser: pytest.Parser) -> None:
    declare(parser)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", 'vram(max_required="8GiB"): the test fails where its pipeline requires more')
    config.pluginmanager.register(Manager(config), "pytest_vram.manager")


class Manager:
    """Owns the sweep of one pytest session and what pytest needs to know of it."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.session: SweepSession | None = None
        self.usage_error: str | None = None
        self.under_xdist = hasattr(config, "workerinput")
        self.interrupted = False
        self.deselected: list[str] = []
        self.problem: str | None = None  # why there is no verdict
        self.shown = 0

    @property
    def terminal(self) -> Any:
        return self.config.pluginmanager.getplugin("terminalreporter")

    @property
    def measures_own(self) -> bool:
        """Whether tests with pipelines of their own measure them, and are not skipped or refused."""
        return self.config.getoption("--vram-device") != "meta" and not self.under_xdist

    def say(self, text: str) -> None:
        """A passing line, on a terminal only."""
        reporter = self.terminal
        if reporter is None or not reporter.isatty or self.config.get_verbosity() < 0:
            return
        if text and self.session and self.session.planned:
            number = min(len(self.session.finished) + 1, len(self.session.expected))
            text = f"{number}/{len(self.session.expected)} {text}"
        capture = self.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled() if capture else nullcontext():
            reporter.rewrite(text[: reporter._tw.fullwidth - 1], erase=True)

    def tell(self, text: str) -> None:
        """A line that stays; an xdist worker, which has no terminal, writes it to stderr."""
        self.say("")
        capture = self.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled() if capture else nullcontext():
            if self.terminal is not None:
                self.terminal.write_line(f"vram: {text}")
            else:
                print(f"vram: {text}", file=sys.stderr)

    def sweep(self) -> SweepSession:
        """The session; made when the first test asks for a case."""
        if self.session is None:
            from pytest_vram.session import SweepSession

            self.session = SweepSession(read(self.config), self.config.rootpath, self.say, self.tell)
        return self.session

    def own_session(self, node: pytest.Item) -> SweepSession:
        """The session for a pipeline that cannot be estimated: it runs, or the test is skipped or failed."""
        if self.config.getoption("--vram-device") == "meta":
            pytest.skip("a pipeline of your own is measured, not estimated: give --vram-device cuda")
        if self.under_xdist:
            pytest.fail("-n: pipelines are measured one at a time; leave -n out", pytrace=False)
        session = self.sweep()
        if session.machine is None:  # no test was seen to ask for the fixture; this one asked at run time
            session.start([], [node.nodeid], keep_journal=True)
        return session

    # Collection

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "vram_case" not in metafunc.fixturenames:
            return
        from pytest_vram.errors import UsageError

        plans: list[Plan] = []
        try:
            plans = self.sweep().plans(metafunc.definition.path.parent)
            options = self.sweep().options
            if self.under_xdist and (options.device != "meta" or options.resume or options.base):
                raise UsageError(
                    "-n: cases are measured, resumed and compared one at a time; leave -n out, or only estimate"
                )
        except UsageError as error:
            self.usage_error = self.usage_error or str(error)
            if self.under_xdist:  # xdist has no way to end with a usage error: one test fails with the line
                metafunc.parametrize("vram_case", [pytest.param(str(error), id="usage-error")], indirect=True)
                return
        benchmarked = self.config.pluginmanager.hasplugin("benchmark")
        marks = [pytest.mark.benchmark(timer=device_time)] if benchmarked else []
        cases = [pytest.param(plan, id=plan.case.id, marks=marks) for plan in plans]
        metafunc.parametrize("vram_case", cases, indirect=True)

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        if plan := _plan(item):
            item.extra_keyword_matches.update(plan.model.aliases)  # -k takes an alias too
        if _is_own(item) and self.config.pluginmanager.hasplugin("benchmark"):
            item.add_marker(pytest.mark.benchmark(timer=device_time))

    @pytest.hookimpl(trylast=True)  # -k and its like have left out theirs
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.config.getoption("--vram-shard") is None or self.usage_error:
            return
        from pytest_vram.errors import UsageError

        plans = {item: plan.case.id for item in items if (plan := _plan(item))}
        own = [item for item in items if _is_own(item) and self.measures_own]
        if not (plans or own):
            return
        try:
            session = self.sweep()
            kept = session.take_shard(plans.values(), [item.nodeid for item in own])
        except UsageError as error:
            self.usage_error = str(error)
            if self.under_xdist:  # as for other bad usage, one test fails with the line
                items[:] = [*plans][:1]
                items[0].callspec.params["vram_case"] = str(error)  # type: ignore[attr-defined]
            return
        left_out = {item for item, id in plans.items() if id not in kept}
        left_out |= {item for item in own if session.own_id(item.nodeid) not in kept}
        items[:] = [item for item in items if item not in left_out]
        self.config.hook.pytest_deselected(items=[*left_out])

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.deselected += [item.nodeid for item in items if _is_own(item)]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if self.usage_error and not self.under_xdist:
            raise pytest.UsageError(self.usage_error)
        for item in session.items:
            if item.get_closest_marker("vram") and not {"vram", "vram_case"} & set(getattr(item, "fixturenames", ())):
                raise pytest.UsageError(f"{item.nodeid}: @pytest.mark.vram: the test measures nothing: use `vram`")
        plans = [plan for item in session.items if (plan := _plan(item))]
        own = [item for item in session.items if _is_own(item)]
        if not self.measures_own:
            own = []
        if self.config.option.collectonly:
            return
        if not (plans or own):
            if self.config.getoption("--vram-compare") and not self.under_xdist:
                raise pytest.UsageError(
                    "--vram-compare: nothing is measured here, so there is nothing to compare; --gpu?"
                )
            return
        from pytest_vram.cases.models import names_with_aliases
        from pytest_vram.errors import VramError

        if self.terminal is not None and not self.under_xdist and self.config.get_verbosity() >= 0:
            measuring = self.config.getoption("--vram-device") == "cuda"
            first = "imports, then all estimates, then the cases" if measuring and plans else "imports, then the cases"
            shard = self.config.getoption("--vram-shard")
            part = f" of shard {shard}" if shard else ""
            self.terminal.write_line(f"vram: {len(plans) + len(own)} cases{part}; {first}")
        try:
            node_ids = [item.nodeid for item in own]
            self.sweep().case_ids = {item.nodeid: plan.case.id for item in session.items if (plan := _plan(item))}
            self.sweep().start(plans, node_ids, keep_journal=not self.under_xdist, deselected=self.deselected)
        except VramError as error:
            raise pytest.UsageError(str(error)) from error
        if self.under_xdist:
            aliases = names_with_aliases(plan.model for plan in plans)
            planned = {"ids": sorted(self.sweep().expected), "aliases": aliases, "asked": self.sweep().asked()}
            self.config.workeroutput["vram"] = planned  # type: ignore[attr-defined]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """An xdist worker has ended: now its controller knows what it had planned."""
        planned = getattr(node, "workeroutput", {}).get("vram")
        if planned:
            self.sweep().expect(**planned)

    # Running

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if records := item.stash.get(RECORDS, None):  # also of a fixture that measures, and fails
            report.vram = [record.model_dump(mode="json") for record in records]  # type: ignore[attr-defined]
            for record in records:
                self.tell_junit(item, record)
            records.clear()
        return report

    def tell_junit(self, item: pytest.Item, record: Record) -> None:
        """The figures of a case, and what is known of its comparison, as properties of its test."""
        from pytest_vram.report.summary import properties

        found = properties(record)
        if self.session is not None:
            self.session.node_ids[record.id] = item.nodeid
            compared = self.session.base.so_far(record) if self.session.base else None
            if compared and compared.verdict != "ambiguous":  # that is a time, of which the last word comes later
                found["vram.compared"] = compared.verdict
        item.user_properties += found.items()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        documents = getattr(report, "vram", None)
        if report.skipped and documents is None and self.session is not None:
            self.session.skip(report.nodeid)
        if documents is None or self.under_xdist:
            return
        from pytest_vram.errors import UsageError
        from pytest_vram.records.schema import Record

        try:
            for document in documents:
                self.sweep().keep(Record.model_validate(document))
        except UsageError as error:  # only under xdist, whose controller opens its journal with the first record
            pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
        self.say("")

    def pytest_report_teststatus(self, report: pytest.TestReport) -> Any:
        documents = getattr(report, "vram", ())
        if report.passed and any(document["status"] == "oom" for document in documents):
            return "oom", "O", ("OOM", {"yellow": True})
        return None

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logfinish(self) -> None:
        session, reporter = self.session, self.terminal
        if session is None or not session.finished or reporter is None or self.under_xdist:
            return
        if self.config.get_verbosity() < 0 or len(session.finished) == self.shown:
            return
        self.shown = len(session.finished)
        from time import monotonic

        from pytest_vram.report.summary import line
        from pytest_vram.report.text import duration

        count = f"{len(session.finished)}/{len(session.expected)}"
        elapsed = duration(monotonic() - session.began)
        last = next(reversed(session.finished.values()))
        text = f" {count} {line(last)}"
        reporter.write(f"{text} ({elapsed} elapsed, about {duration(session.rest_s())} left)\n")

    # The end

    def pytest_keyboard_interrupt(self) -> None:
        self.interrupted = True

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.session is None:
            return
        try:
            self.session.finish(self.interrupted)
            self.compare(session)
        finally:
            self.session.close()

    def compare(self, session: pytest.Session) -> None:
        """The verdict against the base, and pytest's exit code for it."""
        from pytest_vram.errors import VramError

        assert self.session is not None
        try:
            self.session.compare(self.interrupted)
        except KeyboardInterrupt:
            session.exitstatus = pytest.ExitCode.INTERRUPTED
        except VramError as error:
            self.problem = str(error)
        comparison = self.session.comparison
        if comparison is not None and comparison.failed:
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
        if self.session.undecided:
            self.problem = self.problem or f"no verdict on times that look slower: {self.session.undecided}"
        if self.problem:
            session.exitstatus = session.exitstatus or pytest.ExitCode.USAGE_ERROR
        if comparison is None:
            return
        for plugin in self.config.pluginmanager.get_plugins():
            if tell := getattr(plugin, "add_global_property", None):  # JUnit's
                for word, count in comparison.counts().items():
                    tell(f"vram.compared.{word.replace(' ', '_')}", count)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        session = self.session
        if session is None or session.run_path is None:
            return

        from pytest_vram.records.caveats import caveats
        from pytest_vram.report.summary import legend, summary, where_time_went

        terminalreporter.section("VRAM")
        run = session.journal.run if session.journal else None
        table = summary(session.records, run.aliases if run else {})
        terminalreporter.write_line(table)
        terminalreporter.write_line(legend())
        for what, why in caveats(run.environment if run else {}).items():
            terminalreporter.write_line(f"vram: {what}: {why}")
        if session.options.device != "meta":
            terminalreporter.write_line(where_time_went(session.fresh, session.spent_s))
        terminalreporter.write_line(f"run file: {session.run_path}")
        if session.comparison is not None:
            from pytest_vram.report.comparing import table as compared

            terminalreporter.section("VRAM, compared with the base")
            terminalreporter.write_line(compared(session.comparison))
            terminalreporter.write_line(f"comparison: {session.comparison_path}")
        if self.problem:
            terminalreporter.write_line(f"vram: {self.problem}", red=True)

    def pytest_unconfigure(self) -> None:
        if self.session is not None:
            self.session.close()


def _plan(item: pytest.Item) -> Plan | None:
    callspec = getattr(item, "callspec", None)
    plan = callspec.params.get("vram_case") if callspec is not None else None
    return None if isinstance(plan, str) else plan


def _is_own(item: pytest.Item) -> bool:
    """Whether this test measures a pipeline of its own."""
    return "vram" in getattr(item, "fixturenames", ())
