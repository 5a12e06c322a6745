"""One sweep, from the options to the run file: the object that pytest's hooks talk to."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_vram.against import Base, save
from pytest_vram.cases.case import AnyCase
from pytest_vram.cases.models import names_with_aliases
from pytest_vram.cases.sweep import read_thresholds
from pytest_vram.cases.thresholds import Thresholds
from pytest_vram.compare.comparison import Comparison
from pytest_vram.compare.timing import Again
from pytest_vram.confirming import Confirmation
from pytest_vram.errors import UsageError
from pytest_vram.measure import environment
from pytest_vram.measure.channel import Message
from pytest_vram.measure.estimates import Estimates, estimated_record, with_estimate
from pytest_vram.measure.exactness import References
from pytest_vram.measure.job import job_of, own_job
from pytest_vram.measure.machine import Machine, start_machine
from pytest_vram.measure.measurement import CaseInterrupted, Estimated, measure
from pytest_vram.measure.own import described, readable
from pytest_vram.measure.recording import skipped
from pytest_vram.pipelines.optimizations import gpus_of, impossible
from pytest_vram.planning import PACKAGED_MATRIX, Options, Plan, own_case, read_plans, split_node_id
from pytest_vram.records.files import Journal, folder_of, new_path
from pytest_vram.records.reading import ReadRun
from pytest_vram.records.schema import Record, Run
from pytest_vram.resuming import known, newest_unfinished, resumable


class SweepSession:
    """Plans the cases, measures or estimates each when its turn comes, and keeps what was found.

    `say` shows a passing line of progress, `tell` one that stays; `root` is the folder whose commit the run names.
    """

    def __init__(
        self, options: Options, root: Path, say: Callable[[str], None], tell: Callable[[str], None] | None = None
    ) -> None:
        self.options, self.root, self.say, self.tell = options, root, say, tell or say
        self.machine: Machine | None = None
        self.journal: Journal | None = None
        self.estimates: Estimates | None = None
        self.references: References | None = None
        self.planned: list[Plan] = []
        self.finished: dict[str, Record] = {}
        self.fresh: list[Record] = []  # without those that a resumed run brought along
        self.began = self.first_case_began = time.monotonic()
        self.expected: set[str] = set()
        self.run_path: Path | None = None
        self.spent_s = 0.0
        self.complete = False
        self.undecided = ""  # why times that look slower have no verdict, although a base checkout was given
        self.others_aliases: dict[str, list[str]] = {}
        self.base: Base | None = None
        self.comparison: Comparison | None = None
        self.comparison_path: Path | None = None
        self.node_ids: dict[str, str] = {}  # of the tests, by case id
        self.case_ids: dict[str, str] = {}  # of what a sweep planned, by node id
        self._plans: dict[Path, list[Plan]] = {}
        self._thresholds: dict[str, Thresholds] = {}  # of the matrix that planned a case, by its id
        self._deselected: list[str] = []
        self._cases: list[str] = []  # of all shards, in the order of the sweep; empty without a shard
        self._asked_others: dict[str, list[str]] = {}
        self._jobs: dict[str, tuple[AnyCase, Message]] = {}

    # Collection

    def plans(self, test_folder: Path) -> list[Plan]:
        """The cases for a test in this folder; raises UsageError."""
        beside = test_folder / "matrix.toml"
        matrix = self.options.matrix or (beside if beside.is_file() else PACKAGED_MATRIX)
        if matrix not in self._plans:
            self._plans[matrix] = read_plans(matrix, self.options)
            self._thresholds |= dict.fromkeys((p.case.id for p in self._plans[matrix]), read_thresholds(matrix))
        return self._plans[matrix]

    def take_shard(self, ids: Iterable[str], own: Iterable[str]) -> set[str]:
        """Those cases of this shard's, by id; `own` are the node ids of tests that measure pipelines of their own.

        Raises:
            UsageError: where there are fewer cases than shards.
        """
        assert self.options.shard
        chosen = set(ids)
        ordered = dict.fromkeys(plan.case.id for plans in self._plans.values() for plan in plans)
        self._cases = [*(id for id in ordered if id in chosen), *sorted(map(self.own_id, own))]
        return set(self.options.shard.take(self._cases))

    # The sweep

    def start(
        self, plans: Sequence[Plan], own: Iterable[str] = (), *, keep_journal: bool, deselected: Iterable[str] = ()
    ) -> None:
        """Start the machine, the journal and the estimates; raises UsageError before the first case.

        `own` and `deselected` have the node ids of tests that measure pipelines of their own, and of those among them
        that were left out. `keep_journal` is off in xdist workers: their controller keeps it.
        """
        options = self.options
        self.began = time.monotonic()
        self.planned = list({plan.case: plan for plan in plans}.values())
        self.expected = {plan.case.id for plan in self.planned}
        if len(self.expected) < len(self.planned):
            ids = [plan.case.id for plan in self.planned]
            twice = next(name for name in ids if ids.count(name) > 1)
            raise UsageError(f"two sweeps of this session have a case {twice}, with other steps; run them one by one")
        own = list(own)
        self.expected |= set(map(self.own_id, own))
        self._read_own_thresholds(own)
        left_out = {plan.case.id for plans in self._plans.values() for plan in plans}
        left_out |= set(map(self.own_id, deselected))
        self._deselected = sorted(left_out - self.expected)
        self._check_images_folder()
        if options.limit_bytes is not None and options.device == "cpu":
            raise UsageError("--vram-limit: there is no GPU memory to limit with --vram-device cpu")
        if keep_journal and options.device != "cuda":
            self.open_journal({})  # a folder that cannot be written is known before the imports
        models = {plan.model.name: plan.model for plan in self.planned}
        try:
            if options.device != "cuda":
                self._find_base({})  # before the imports; on a GPU it must be known which
            self.machine = start_machine(
                options.device,
                models.values(),
                allow_shared=options.allow_shared,
                name_host=options.name_host,
                say=self.say,
                tell=self.tell,
                gpus=None if own else max((gpus_of(plan.case.optimizations) for plan in self.planned), default=1),
            )
            if options.device == "cuda":
                self._find_base(self.machine.facts)
            if keep_journal and options.device == "cuda":
                self.open_journal(self.machine.facts)
        except BaseException:
            self.abandon()
            raise
        records = self.journal.records if self.journal else {}
        wanted = [plan.case for plan in self.planned if known(records, plan.case) is None]
        if options.device != "meta":
            self.references = References(wanted)
        if options.device != "cpu" and options.estimate:
            capability = self.machine.facts.get("compute_capability")
            self.estimates = Estimates(wanted, models, self.machine.starter, capability, ahead=keep_journal)
        if self.estimates and options.device == "cuda":  # first, so that nothing runs beside a measurement
            self.estimates.finish(options.settings.timeout_s, self.say)
        self.first_case_began = time.monotonic()

    def _read_own_thresholds(self, own: Iterable[str]) -> None:
        """Those of the matrix beside a test with a pipeline of its own, or of the one that was named."""
        for node_id in own if self.options.base else ():
            beside = self.root / split_node_id(node_id)[0]
            matrix = self.options.matrix or beside.parent / "matrix.toml"
            if self.options.matrix or matrix.is_file():
                self._thresholds[self.own_id(node_id)] = read_thresholds(matrix)

    def _check_images_folder(self) -> None:
        folder = self.options.settings.save_images
        try:
            if folder:
                Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--vram-save-images: {folder} cannot be written: {error.strerror}") from error

    def expect(self, ids: Iterable[str], aliases: Mapping[str, list[str]], asked: dict[str, list[str]]) -> None:
        """Cases that others run for this session (xdist), which keeps their records."""
        self.expected |= set(ids)
        self.others_aliases |= aliases
        self._asked_others = asked

    def open_journal(self, facts: dict[str, Any]) -> Journal:
        """The journal of this run: a new one, or the one that is resumed."""
        if self.journal is not None:
            return self.journal
        options = self.options
        run = self._described(facts)
        folder = self._folder(facts)
        path = None
        if options.resume:
            path, records = resumable(folder, run, options.shard, self.planned)
            run = run.model_copy(update={"records": records})
        run = run.model_copy(update={"aliases": names_with_aliases(plan.model for plan in self.planned)})
        self.journal = Journal(path or new_path(folder, run.environment), run)
        return self.journal

    def _folder(self, facts: Mapping[str, Any]) -> Path:
        """Where the runs of this device go."""
        return self.options.results / folder_of(self.options.device, facts.get("gpu"))

    def asked(self) -> dict[str, list[str]]:
        """Which cases of the sweep were not asked for; and of a shard those of all shards, in order."""
        return {"deselected": self._deselected, **({"cases": self._cases} if self._cases else {})}

    def _described(self, facts: dict[str, Any]) -> Run:
        """This run, without records. `facts` are those of the GPU."""
        options, overrides = self.options, self.options.overrides
        start = self.machine.starter.name if self.machine else "fork"
        return Run(
            environment={**environment.describe(self.root, start=start, name_host=options.name_host), **facts},
            sweep=options.sweep,
            options={
                "device": options.device,
                "tests": list(options.tests),
                "overrides": {k: v if isinstance(v, int) else list(v) for k, v in vars(overrides).items() if v},
                **self.asked(),
                **({"shard": str(options.shard)} if options.shard else {}),
                "selection": self.options.selection,
                "workers": options.settings.workers,
                "rounds": options.settings.rounds,
            },
        )

    def _find_base(self, facts: dict[str, Any]) -> None:
        """Read what this run is compared with; raises UsageError where that cannot be."""
        options = self.options
        if options.base is None or self.base is not None:
            return
        self.say("the base")
        described = self._described(facts)
        resumed, _ = (options.resume and newest_unfinished(self._folder(facts), options.shard)) or (None, None)
        self.base = Base(options.base, described, options.results, self.root, self._thresholds, resumed)
        self.base.check_cases(self.expected, {plan.case.id: plan.case for plan in self.planned}, set(self._cases))

    def run(self, plan: Plan) -> Record:
        """The record of one case; a KeyboardInterrupt leaves its record in the journal."""
        assert self.machine is not None
        if self.journal and (record := known(self.journal.records, plan.case)):
            return record
        if self.options.device == "meta":
            return self._estimate(plan)
        outcome: dict[str, Any] = {}
        if self.estimates and not impossible(plan.case.optimizations, self.options.device, plan.case.weights):
            outcome, _ = self.estimates.result(plan.case, self.options.settings.timeout_s)
        estimated = Estimated(outcome["need"], outcome["allocated_peak"]) if outcome.get("event") == "done" else None
        record = self._measure(plan.case, job_of(plan.case, plan.model), estimated)
        return with_estimate(record, outcome) if outcome else record

    def own_id(self, node_id: str) -> str:
        """The id of the case that a test with a pipeline of its own measures."""
        return own_case(node_id, self.options.limit_bytes).id

    def run_own(self, node_id: str, number: int, build: Callable[..., Any], call: Callable[..., Any]) -> Record:
        """The record of the pipeline that a test's own functions build and call, the `number`-th of this test.

        Raises:
            UsageError: when the functions cannot travel to a worker.
        """
        assert self.machine is not None
        functions = described(build, "build"), described(call, "call")
        names = [readable(function, self.root) for function in functions]
        case = own_case(node_id, self.options.limit_bytes, number, *names)
        self.expected.add(case.id)
        if self.journal and self._same_code() and (record := known(self.journal.records, case)):
            return record
        return self._measure(case, own_job(case, *functions, self.machine.environ), None)

    def _same_code(self) -> bool:
        """Whether a resumed run is known to have had the same functions."""
        described = self.journal.run.environment if self.journal else {}
        return bool(described.get("commit")) and not described.get("dirty")

    def _measure(self, case: AnyCase, job: Message, estimated: Estimated | None) -> Record:
        assert self.machine is not None
        self._jobs[case.id] = case, job
        try:
            return measure(case, job, self.machine, self.options.settings, self.say, estimated, self.references)
        except CaseInterrupted as interrupt:
            if self.journal:
                self.journal.add(interrupt.record)
            raise KeyboardInterrupt from None

    def _estimate(self, plan: Plan) -> Record:
        assert self.estimates is not None
        if reason := impossible(plan.case.optimizations, "meta", plan.case.weights):
            return skipped(reason, {"id": plan.case.id, "case": plan.case, "method": "estimated"})
        self.say(f"estimating {plan.case.id}")
        outcome, seconds = self.estimates.result(plan.case, self.options.settings.timeout_s)
        return estimated_record(plan.case, outcome, seconds)

    def keep(self, record: Record) -> None:
        """A case has ended: its record is on the disk before the next one starts."""
        if self.journal is None:
            self.open_journal({})
        assert self.journal is not None
        if self.journal.records.get(record.id) != record:
            self.journal.add(record)
            self.fresh.append(record)
        self.finished[record.id] = record

    def skip(self, node_id: str) -> None:
        """A test was skipped before it measured: its case is none of this run's."""
        if node_id in self.case_ids:
            self.expected.discard(self.case_ids[node_id])
        elif all(split_node_id(node_id)):
            self.expected.discard(self.own_id(node_id))

    def rest_s(self) -> float:
        """The expected rest of the sweep in seconds, from the cases so far."""
        left = max(0, len(self.expected) - len(self.finished))
        each = (time.monotonic() - self.first_case_began) / len(self.fresh) if self.fresh else 0.0
        return each * left

    # The end

    def finish(self, interrupted: bool) -> None:
        """Write the run file."""
        self.spent_s = time.monotonic() - self.began
        if self.journal is None:
            return
        if not self.journal.records:
            self.journal.discard()
            return
        records = self.journal.records
        complete = not interrupted and self.expected <= records.keys()
        if self.others_aliases:
            options = {**self.journal.run.options, **self._asked_others}
            self.journal.run = self.journal.run.model_copy(update={"aliases": self.others_aliases, "options": options})
        self.run_path = self.journal.finish(complete)
        self.complete = complete

    def compare(self, interrupted: bool) -> None:
        """The verdict on the finished run; times that look slower are measured again, unless somebody waits to go.

        Raises:
            NotComparable: where none of the base's cases came to be measured, or the verdict cannot be written.
        """
        if self.base is None or self.run_path is None or self.journal is None:
            return
        update = {"records": self.records, "complete": self.complete}
        head = ReadRun(self.run_path, self.journal.run.model_copy(update=update))
        again: dict[str, Again] = {}
        notes: list[str] = []
        stopped = None
        try:
            if not interrupted and self.options.device != "meta":
                again, notes = self._confirmation(self.base).again(head)
        except KeyboardInterrupt as interrupt:
            stopped = interrupt
            notes = ["interrupted while times were measured again"]
        self.comparison = self.base.conclude(head, again, notes)
        if self.base.checkout is not None and notes:
            self.undecided = "; ".join(notes)
        self.comparison_path = save(self.comparison, self.run_path)
        if stopped:
            raise stopped

    def _confirmation(self, base: Base) -> Confirmation:
        return Confirmation(base, self.options, self.root, self.machine, self._jobs, self.node_ids, self.say)

    def abandon(self) -> None:
        """Nothing was run: leave nothing behind."""
        self.close()
        if self.journal and not self.journal.records:
            self.journal.discard()
            self.journal = None

    def close(self) -> None:
        if self.references:
            self.references.close()
        if self.estimates:
            self.estimates.close()
        if self.machine:
            self.machine.close()

    @property
    def records(self) -> list[Record]:
        """What the run holds now."""
        return list(self.journal.records.values()) if self.journal else []
