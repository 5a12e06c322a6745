"""The hooks of pytest. Nothing heavy is imported before a test asks for `vram_case` or `vram`."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from pytest_vram.fixtures import RECORDS, device_time, vram, vram_case
from pytest_vram.options import declare, read
from pytest_vram.parallel import Claims, Controller, count_gpus, measures_on_gpus, part_of

if TYPE_CHECKING:
    from pytest_vram.planning import Plan
    from pytest_vram.records.schema import Record
    from pytest_vram.session import SweepSession

__all__ = ["vram", "vram_case"]  # the fixtures, for pytest to find here


def pytest_addoption(parser: pytest.Parser) -> None:
    declare(parser)


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    return count_gpus(config)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", 'vram(max_required="8GiB"): the test fails where its pipeline requires more')
    config.pluginmanager.register(manager := Manager(config), "pytest_vram.manager")
    if manager.part:
        config.pluginmanager.register(Claims(manager.part), "pytest_vram.claims")


class Manager:
    """Owns the sweep of one pytest session and what pytest needs to know of it."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.session: SweepSession | None = None
        self.usage_error: str | None = None
        self.under_xdist = hasattr(config, "workerinput")
        self.part = part_of(config)  # where this is one of several xdist workers that measure
        self.controller: Controller | None = None  # where this is what they are controlled by
        self.interrupted = False
        self.deselected: list[str] = []
        self.problem: str | None = None  # why there is no verdict
        self.shown = self.told = 0

    @property
    def terminal(self) -> Any:
        return self.config.pluginmanager.getplugin("terminalreporter")

    @property
    def measures_own(self) -> bool:
        """Whether tests with pipelines of their own measure them, and are not skipped or refused."""
        return self.config.getoption("--vram-device") != "meta" and (self.part is not None or not self.under_xdist)

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
                self.terminal.ensure_newline()
                self.terminal.write_line(f"vram: {text}")
            else:
                print(f"vram: {text}", file=sys.stderr)

    def tell_notes(self) -> None:
        """What the session has to say beside its records, once."""
        notes = self.session.notes if self.session else []
        for note in notes[self.told :]:
            self.tell(note)
        self.told = len(notes)

    def sweep(self) -> SweepSession:
        """The session; made when the first test asks for a case."""
        if self.session is None:
            from pytest_vram.session import SweepSession

            root, part = self.config.rootpath, self.part
            self.session = SweepSession(read(self.config), root, self.say, self.tell, part=part)
        return self.session

    def refuse(self, problem: str) -> NoReturn:
        """End pytest with a usage error; from an xdist worker by way of its controller."""
        if not self.under_xdist:
            raise pytest.UsageError(problem)
        self.config.workeroutput["vram_refused"] = problem  # type: ignore[attr-defined]
        pytest.exit(problem, returncode=pytest.ExitCode.USAGE_ERROR)

    def own_session(self, node: pytest.Item) -> SweepSession:
        """The session for a pipeline that cannot be estimated: it runs, or the test is skipped or failed."""
        if self.config.getoption("--vram-device") == "meta":
            pytest.skip("a pipeline of your own is measured, not estimated: give --vram-device cuda")
        if not self.measures_own:
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
            if self.under_xdist and not self.part and (options.device != "meta" or options.resume or options.base):
                raise UsageError(
                    "-n: without GPUs cases are run, resumed, compared one at a time; leave -n out, or only estimate"
                )
        except UsageError as error:
            self.usage_error = self.usage_error or str(error)
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
            return
        left_out = {item for item, id in plans.items() if id not in kept}
        left_out |= {item for item in own if session.own_id(item.nodeid) not in kept}
        items[:] = [item for item in items if item not in left_out]
        self.config.hook.pytest_deselected(items=[*left_out])

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.deselected += [item.nodeid for item in items if _is_own(item)]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if self.usage_error:
            self.refuse(self.usage_error)
        for item in session.items:
            if item.get_closest_marker("vram") and not {"vram", "vram_case"} & set(getattr(item, "fixturenames", ())):
                self.refuse(f"{item.nodeid}: @pytest.mark.vram: the test measures nothing: use `vram`")
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
            keep_journal = self.part is not None or not self.under_xdist
            self.sweep().start(plans, node_ids, keep_journal=keep_journal, deselected=self.deselected)
        except VramError as error:
            self.refuse(str(error))
        self.tell_notes()
        if self.under_xdist and not self.part:
            aliases = names_with_aliases(plan.model for plan in plans)
            planned = {"ids": sorted(self.sweep().expected), "aliases": aliases, "asked": self.sweep().asked()}
            self.config.workeroutput["vram"] = planned  # type: ignore[attr-defined]

    # With pytest-xdist

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_setupnodes(self, specs: Sequence[Any]) -> None:
        if not measures_on_gpus(self.config):
            return
        from pytest_vram.errors import UsageError

        try:
            self.controller = Controller(self.config, specs)
            self.sweep()
        except UsageError as error:
            raise pytest.UsageError(str(error)) from error
        self.config.pluginmanager.register(self.controller, "pytest_vram.controller")
        if self.terminal is not None and self.config.get_verbosity() >= 0:
            self.terminal.write_line(f"vram: {self.controller.said()}; imports, then all estimates, then the cases")

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """An xdist worker has ended: now its controller knows what it had planned, or why it refused to."""
        output = getattr(node, "workeroutput", {})
        if refused := output.get("vram_refused"):
            raise pytest.UsageError(refused)
        if planned := output.get("vram"):
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
        if self.controller:
            self.controller.tell(self.sweep())
        if report.skipped and documents is None and self.session is not None:
            self.session.skip(report.nodeid)
        if documents is None or (self.under_xdist and not self.part):
            return
        from pytest_vram.errors import UsageError
        from pytest_vram.records.schema import Record

        try:
            for record in map(Record.model_validate, documents):
                if self.controller:
                    self.controller.note(self.sweep(), record)
                else:
                    self.sweep().keep(record)
        except UsageError as error:  # only under xdist, whose controller opens its journal with the first record
            pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
        self.say("")
        self.tell_notes()

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
        from time import monotonic

        from pytest_vram.report.summary import line
        from pytest_vram.report.text import duration

        elapsed, left = duration(monotonic() - session.began), duration(session.rest_s())
        new = [*session.finished.values()][self.shown :]  # of several xdist workers there may be more than one
        for number, record in enumerate(new, self.shown + 1):
            count = f"{number}/{len(session.expected)}"
            reporter.write(f" {count} {line(record)} ({elapsed} elapsed, about {left} left)\n")
        self.shown = len(session.finished)

    # The end

    def pytest_keyboard_interrupt(self) -> None:
        self.interrupted = True

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.controller:
            self.controller.end_workers()
        if self.session is None:
            return
        try:
            if self.controller:
                self.problem = self.controller.finish(self.session, self.interrupted)
            else:
                self.session.finish(self.interrupted)
            self.compare(session)
        except KeyboardInterrupt:  # twice: somebody cannot wait; what was measured is in the journal
            pytest.exit("vram: interrupted twice", returncode=pytest.ExitCode.INTERRUPTED)
        finally:
            self.session.close()
        if self.session.unsaved:
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED

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
        self.tell_notes()
        session = self.session
        if session is None:
            return
        if session.unsaved:
            terminalreporter.write_line(f"vram: {session.unsaved}", red=True)
        if session.written:
            from pytest_vram.records.caveats import caveats
            from pytest_vram.report.summary import legend, summary, where_time_went

            terminalreporter.section("VRAM")
            for written in session.written:
                terminalreporter.write_line(summary(written.records, written.run.aliases))
            terminalreporter.write_line(legend())
            found = [caveat for one in session.written for caveat in caveats(one.run.environment).items()]
            for what, why in dict.fromkeys(found):
                terminalreporter.write_line(f"vram: {what}: {why}")
            if session.options.device != "meta":
                gpus = len(self.controller.gpus) if self.controller else 1
                terminalreporter.write_line(where_time_went(session.fresh, session.spent_s, gpus))
            for written in session.written:
                terminalreporter.write_line(f"run file: {written.path}")
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
        if self.controller:
            self.controller.close()


def _plan(item: pytest.Item) -> Plan | None:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("vram_case") if callspec is not None else None


def _is_own(item: pytest.Item) -> bool:
    """Whether this test measures a pipeline of its own."""
    return "vram" in getattr(item, "fixturenames", ())
