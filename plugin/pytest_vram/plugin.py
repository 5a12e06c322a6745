"""The hooks and options of pytest. Nothing heavy is imported before a test asks for `vram_case` or `vram`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_vram.against import BaseOptions
    from pytest_vram.measure.machine import Device
    from pytest_vram.records.schema import Record
    from pytest_vram.session import Options, Plan, SweepSession


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vram", "what diffusion models cost on a GPU (pytest-vram)")
    add = group.addoption
    add(
        "--vram-device",
        dest="vram_device",  # a conftest may give it a shorter name
        choices=("meta", "cpu", "cuda"),
        default="meta",
        help="meta estimates with no GPU (default); cuda measures; cpu really runs small models",
    )
    add("--vram-matrix", metavar="FILE", help="the sweeps; default: matrix.toml beside the test")
    add("--vram-sweep", metavar="NAME", default="default", help="the sweep of the matrix; default: default")
    add("--vram-models", metavar="A,B", help="these models, in place of the sweep's")
    add("--vram-optimizations", metavar="A,B+C", help="these sets of optimizations, such as fp16,fp16+vae_tiling")
    add("--vram-resolutions", metavar="N,WxH", help="these resolutions: 512, 1024x768 (width x height), native")
    add("--vram-frames", metavar="N,M", help="these numbers of frames, of the models that make videos")
    add("--vram-batch-sizes", metavar="N,M", help="these batch sizes")
    add("--vram-steps", metavar="N", help="denoising steps of every case")
    add("--vram-rounds", metavar="N", help="rounds of every case; default: 5 to 30, from a pilot call")
    add("--vram-workers", metavar="N", default="1", help="fresh workers a case is timed in; default: 1")
    add(
        "--vram-weights",
        choices=("random", "pretrained"),
        default="random",
        help="random (default: no download, the same memory and time) or pretrained (hub id or folder)",
    )
    add("--vram-no-need", action="store_true", help="do not search the need: quicker, and no required memory")
    add("--vram-limit", metavar="SIZE", help="the memory each case may have, context included, such as 8GiB")
    add("--vram-no-estimate", action="store_true", help="measure without an estimate beside each record")
    add("--vram-timeout", metavar="SECONDS", help="for one worker of a case; default: from its estimate, 600 or more")
    add("--vram-results", metavar="DIR", default="results", help="where run files go; default: results")
    add("--vram-shard", metavar="K/N", help="every N-th case from the K-th on; `pytest-vram merge` joins the N runs")
    add("--vram-resume", action="store_true", help="go on with the newest unfinished run")
    add("--vram-compare", metavar="BASE", help="exit 1 where this run is worse: a file, folder, commit, or latest")
    add("--vram-base-checkout", metavar="DIR", help="the base's checkout, to measure again what looks slower")
    add("--vram-across", metavar="KEY,KEY", help="compare although these differ, such as torch or steps")
    add("--vram-strict", action="store_true", help="with --vram-compare: ambiguous fails too")
    add("--vram-save-images", metavar="DIR", help="write the images of each case's last round")
    add("--vram-allow-shared", action="store_true", help="measure although other processes use the GPU")
    add("--vram-name-host", action="store_true", help="write host name and GPU uuid as they are, not hashed")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", 'vram(max_required="8GiB"): the test fails where its pipeline requires more')
    config.pluginmanager.register(Manager(config), "pytest_vram.manager")


def _options(config: pytest.Config) -> Options:
    """The command line as one object; raises UsageError of this package."""
    from pytest_vram.cases.case import parse_bytes
    from pytest_vram.cases.shard import Shard
    from pytest_vram.cases.sweep import Overrides
    from pytest_vram.errors import UsageError
    from pytest_vram.measure.measurement import Settings
    from pytest_vram.session import Options

    def text(name: str) -> str | None:
        value: str | None = config.getoption(f"--vram-{name}")
        return value

    def names(name: str) -> tuple[str, ...] | None:
        value = text(name)
        if value is None:
            return None
        found = tuple(part.strip() for part in value.split(",") if part.strip())
        if not found:
            raise UsageError(f"--vram-{name}: is empty; name one or more, or leave it out")
        return found

    device: Device = config.getoption("--vram-device")
    needless = [f"--vram-{name}" for name in ("rounds", "save-images") if device == "meta" and text(name)]
    if needless:
        raise UsageError(f"{needless[0]}: nothing is run for an estimate; give --gpu, or leave it out")
    batches = names("batch-sizes")
    limit = text("limit")
    matrix = text("matrix")
    images = text("save-images")
    shard = text("shard")
    return Options(
        device=device,
        matrix=Path(matrix) if matrix else None,
        sweep=str(text("sweep")),
        overrides=Overrides(
            models=names("models"),
            optimizations=names("optimizations"),
            resolutions=names("resolutions"),
            frames=names("frames"),
            batch_sizes=None if batches is None else tuple(_whole(n, "--vram-batch-sizes") for n in batches),
            steps=_whole(text("steps"), "--vram-steps"),
        ),
        weights=config.getoption("--vram-weights"),
        limit_bytes=None if limit is None else parse_bytes(limit, "--vram-limit"),
        settings=Settings(
            rounds=_whole(text("rounds"), "--vram-rounds"),
            workers=_whole(text("workers"), "--vram-workers") or 1,
            timeout_s=_whole(text("timeout"), "--vram-timeout"),
            save_images=str(Path(images).absolute()) if images else None,
            need=not config.getoption("--vram-no-need"),
        ),
        results=Path(str(text("results"))),
        shard=None if shard is None else Shard.parse(shard),
        resume=config.getoption("--vram-resume"),
        estimate=not config.getoption("--vram-no-estimate"),
        base=_base_options(config, names("across") or ()),
        tests=tuple(_readable_argument(argument, config) for argument in config.args),
        selection=_selection(config),
        allow_shared=config.getoption("--vram-allow-shared"),
        name_host=config.getoption("--vram-name-host"),
    )


def _base_options(config: pytest.Config, across: tuple[str, ...]) -> BaseOptions | None:
    from pytest_vram.against import BaseOptions
    from pytest_vram.compare.keys import known_key
    from pytest_vram.errors import UsageError

    name, checkout = config.getoption("--vram-compare"), config.getoption("--vram-base-checkout")
    if not name:
        given = {"base-checkout": checkout, "across": across, "strict": config.getoption("--vram-strict")}
        needless = next((option for option, value in given.items() if value), None)
        if needless and name is None:  # an empty one turns off what pytest.ini asks for
            raise UsageError(f"--vram-{needless}: says how to compare; give --vram-compare too, or leave it out")
        return None
    return BaseOptions(
        name=name,
        checkout=Path(checkout) if checkout else None,
        across=tuple(known_key(key, "--vram-across") for key in across),
        strict=config.getoption("--vram-strict"),
    )


def _selection(config: pytest.Config) -> dict[str, Any]:
    """pytest's options that leave tests out, where they are given."""
    names = ("keyword", "markexpr", "deselect", "ignore", "ignore_glob", "lf")
    return {name: value for name in names if (value := getattr(config.option, name, None))}


def _readable_argument(argument: str, config: pytest.Config) -> str:
    """A path or node id of the command line, as seen from the rootdir."""
    path, *rest = argument.split("::", 1)
    absolute = (config.invocation_params.dir / path).resolve()
    inside = absolute.is_relative_to(config.rootpath)
    return "::".join([(absolute.relative_to(config.rootpath) if inside else absolute).as_posix(), *rest])


def _whole(text: str | None, option: str) -> Any:
    from pytest_vram.errors import UsageError

    if text is None:
        return None
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise UsageError(f"{option}: {text!r} is not a whole number of 1 or more")
    return int(text)


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
    if isinstance(request.param, str):
        pytest.fail(request.param, pytrace=False)
    manager: Manager = request.config.pluginmanager.getplugin("pytest_vram.manager")
    return VramCase(request.param, manager, request)


@pytest.fixture
def vram(request: pytest.FixtureRequest) -> Vram:
    """Measures a pipeline of your own: `record = vram.measure(build, call)`."""
    manager: Manager = request.config.pluginmanager.getplugin("pytest_vram.manager")
    return Vram(manager, request)


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
        self.shown = self.told = 0

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

            self.session = SweepSession(_options(self.config), self.config.rootpath, self.say, self.tell)
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
        self.tell_notes()
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
        if session is None or (session.run_path is None and not session.unsaved):
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
        if session.unsaved:
            terminalreporter.write_line(f"vram: {session.unsaved}", red=True)
        else:
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
