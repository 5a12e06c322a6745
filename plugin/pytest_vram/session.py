"""One sweep, from the options to the run file: the object that pytest's hooks talk to."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pytest_vram.against import Base, save
from pytest_vram.cases.case import AnyCase, Case
from pytest_vram.cases.models import Model, names_with_aliases
from pytest_vram.cases.sweep import read_thresholds
from pytest_vram.cases.thresholds import Thresholds
from pytest_vram.compare.comparison import Comparison
from pytest_vram.compare.timing import Again
from pytest_vram.confirming import Confirmation
from pytest_vram.errors import NotSaved, UsageError
from pytest_vram.exchange import Part, Planned
from pytest_vram.interrupting import terminate_as_ctrl_c
from pytest_vram.measure import environment
from pytest_vram.measure.channel import Message
from pytest_vram.measure.estimates import Estimates, estimated_record, with_estimate
from pytest_vram.measure.exactness import References
from pytest_vram.measure.job import job_of, own_job
from pytest_vram.measure.machine import Machine, start_machine
from pytest_vram.measure.measurement import CaseInterrupted, Estimated, Settings, measure
from pytest_vram.measure.own import described, readable
from pytest_vram.measure.recording import skipped
from pytest_vram.measure.timeout import LEAST_S, timeout_s
from pytest_vram.pipelines.optimizations import gpus_of, impossible
from pytest_vram.planning import PACKAGED_MATRIX, Options, Plan, own_case, read_plans, split_node_id
from pytest_vram.records.files import Journal, folder_of, new_path, read_journal, run_path_of, write_run
from pytest_vram.records.merging import apart, joined
from pytest_vram.records.reading import ReadRun
from pytest_vram.records.resuming import Unfinished, find_unfinished, kept, known
from pytest_vram.records.schema import Record, Run


class SweepSession:
    """Plans the cases, measures or estimates each when its turn comes, and keeps what was found.

    `say` shows a passing line of progress, `tell` one that stays; `root` is the folder whose commit the run names;
    `part` is the share of an xdist worker, where several measure.
    """

    def __init__(
        self,
        options: Options,
        root: Path,
        say: Callable[[str], None],
        tell: Callable[[str], None] | None = None,
        *,
        part: Part | None = None,
    ) -> None:
        self.options, self.root, self.say, self.tell, self.part = options, root, say, tell or say, part
        self.machine: Machine | None = None
        self.journal: Journal | None = None
        self.estimates: Estimates | None = None
        self.references: References | None = None
        self.planned: list[Plan] = []
        self.finished: dict[str, Record] = {}
        self.fresh: list[Record] = []  # without those that a resumed run brought along
        self.began = self.first_case_began = time.monotonic()
        self.expected: set[str] = set()
        self.written: list[ReadRun] = []  # the run file, or of GPUs that differ one for each environment
        self.spent_s = 0.0
        self.undecided = ""  # why times that look slower have no verdict, although a base checkout was given
        self.others_aliases: dict[str, list[str]] = {}
        self.base: Base | None = None
        self.comparison: Comparison | None = None
        self.comparison_path: Path | None = None
        self.order: list[str] = []  # the ids of all cases
        self.node_ids: dict[str, str] = {}  # of the tests, by case id
        self.case_ids: dict[str, str] = {}  # of what a sweep planned, by node id
        self._plans: dict[Path, list[Plan]] = {}
        self._thresholds: dict[str, Thresholds] = {}  # of the matrix that planned a case, by its id
        self._deselected: list[str] = []
        self._cases: list[str] = []  # of all shards, in the order of the sweep; empty without a shard
        self._asked_others: dict[str, list[str]] = {}
        self._goes_on_with: tuple[Path, list[Record]] | None = None
        self._jobs: dict[str, tuple[AnyCase, Message]] = {}
        self._timeouts: dict[str, float] = {}  # from estimates, by case id
        self._claimed: Unfinished | None = None
        self._restore: Callable[[], None] = lambda: None
        self.notes: list[str] = []  # what a person should know beside the records
        self.unsaved = ""  # why records that were found are not on the disk

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
        self._restore = terminate_as_ctrl_c()
        self.began = time.monotonic()
        self.planned = list({plan.case: plan for plan in plans}.values())
        self.expected = {plan.case.id for plan in self.planned}
        if len(self.expected) < len(self.planned):
            ids = [plan.case.id for plan in self.planned]
            twice = next(name for name in ids if ids.count(name) > 1)
            raise UsageError(f"two sweeps of this session have a case {twice}, with other steps; run them one by one")
        own = list(own)
        self.expected |= set(map(self.own_id, own))
        self.order = [*(plan.case.id for plan in self.planned), *map(self.own_id, own)]
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
            outputs = self.part.exchange.outputs(str(self.machine.facts.get("gpu"))) if self.part else None
            self.references = References(wanted, outputs)
        if options.device != "cpu" and options.estimate:
            self._estimate_first(wanted, models, ahead=keep_journal)
        if self.part:
            case_ids = {**self.case_ids, **{node_id: self.own_id(node_id) for node_id in own}}
            aliases = names_with_aliases(plan.model for plan in self.planned)
            self.part.exchange.put_plan(self.part.worker, Planned(self.order, case_ids, list(records), aliases))
        self.first_case_began = time.monotonic()

    def _estimate_first(self, cases: list[Case], models: dict[str, Model], *, ahead: bool) -> None:
        """On a GPU all are estimated before any is measured, so that nothing runs beside a measurement; several xdist
        workers, of which none measures before all have done this, estimate a part each."""
        assert self.machine is not None
        part, capability = self.part, self.machine.facts.get("compute_capability")
        if part:
            alone = [case for case in cases if gpus_of(case.optimizations) == 1]
            cases = [case for case in part.share(alone) if part.exchange.estimate(case.id) is None]
        beside = part.of if part else 1
        self.estimates = Estimates(cases, models, self.machine.starter, capability, ahead=ahead, beside=beside)
        if self.options.device == "cuda":
            self.estimates.finish(self.options.settings.timeout_s or LEAST_S, self.say)
        if part:
            for case, outcome in self.estimates.done().items():
                part.exchange.put_estimate(case.id, outcome)

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
            path, records = self._resumed(folder, run)
            run = run.model_copy(update={"records": records})
        run = run.model_copy(update={"aliases": names_with_aliases(plan.model for plan in self.planned)})
        part = self.part
        path = path or (part.run_path if part else new_path)(folder, run.environment)
        self.journal = Journal(path, run, part.worker if part else "")
        if part:
            part.exchange.put_journal(part.worker, self.journal.path)
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
                "need": options.settings.need,
                "difference": options.settings.difference,
                "limit_bytes": options.limit_bytes,
            },
        )

    def _find_base(self, facts: dict[str, Any]) -> None:
        """Read what this run is compared with; raises UsageError where that cannot be."""
        options = self.options
        if options.base is None or self.base is not None:
            return
        self.say("the base")
        described = self._described(facts)
        resumed = self._resumed(self._folder(facts), described)[0] if options.resume else None
        self.base = Base(options.base, described, options.results, self.root, self._thresholds, resumed)
        self.base.check_cases(self.expected, {plan.case.id: plan.case for plan in self.planned}, set(self._cases))

    def _resumed(self, folder: Path, run: Run) -> tuple[Path, list[Record]]:
        """The run file of the sweep that this one goes on with, and its records that need not be made again; the first
        of several xdist workers finds it for all."""
        if self._goes_on_with is None and self.part:
            make = partial(self._resumable, folder, run)
            self._goes_on_with = self.part.exchange.resumed(apart(run.environment), make)
        elif self._goes_on_with is None:
            self._goes_on_with = self._resumable(folder, run)
        return self._goes_on_with

    def _resumable(self, folder: Path, run: Run) -> tuple[Path, list[Record]]:
        """The newest unfinished run of this folder, and its records that need not be made again."""
        found = find_unfinished(folder, str(self.options.shard) if self.options.shard else None)
        if found is None:
            raise UsageError(f"--vram-resume: no unfinished run in {folder}; leave it out to start a new one")
        self._claimed = found
        self.notes += found.notes
        return run_path_of(found.path), kept(found, run, {plan.case.id: plan.case for plan in self.planned})

    def run(self, plan: Plan) -> Record:
        """The record of one case; a KeyboardInterrupt leaves its record in the journal."""
        assert self.machine is not None
        if self.journal and (record := known(self.journal.records, plan.case)):
            return record
        if self.options.device == "meta":
            return self._estimate(plan)
        if self.part and (gpus := gpus_of(plan.case.optimizations)) > 1:
            reason = f"it takes {gpus} GPUs, and -n gives each case one: leave -n out"
            return skipped(reason, {"id": plan.case.id, "case": plan.case, "method": "measured"})
        outcome: dict[str, Any] = {}
        if self.estimates and not impossible(plan.case.optimizations, self.options.device, plan.case.weights):
            outcome = self.part.exchange.estimate(plan.case.id) or {} if self.part else {}
            outcome = outcome or self.estimates.result(plan.case, self.options.settings.timeout_s or LEAST_S)[0]
            self._timeouts[plan.case.id] = timeout_s(plan.case, outcome, self.options.settings.rounds)
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
            return measure(case, job, self.machine, self.settings(case.id), self.say, estimated, self.references)
        except CaseInterrupted as interrupt:
            self._store(interrupt.record)
            raise KeyboardInterrupt from None

    def settings(self, id: str) -> Settings:
        """Those for one case: with the timeout from its estimate, unless one was given."""
        settings = self.options.settings
        return replace(settings, timeout_s=settings.timeout_s or self._timeouts.get(id, LEAST_S))

    def _estimate(self, plan: Plan) -> Record:
        assert self.estimates is not None
        if reason := impossible(plan.case.optimizations, "meta", plan.case.weights):
            return skipped(reason, {"id": plan.case.id, "case": plan.case, "method": "estimated"})
        self.say(f"estimating {plan.case.id}")
        outcome, seconds = self.estimates.result(plan.case, self.options.settings.timeout_s or LEAST_S)
        return estimated_record(plan.case, outcome, seconds)

    def keep(self, record: Record) -> None:
        """A case has ended: its record is on the disk before the next one starts."""
        if self.journal is None:
            self.open_journal({})
        assert self.journal is not None
        if self.journal.records.get(record.id) != record:
            self._store(record)
            self.fresh.append(record)
        self.finished[record.id] = record

    def _store(self, record: Record) -> None:
        """Into the journal; where there is no room for it the sweep goes on, and it is tried again with the next."""
        if self.journal is None:
            return
        try:
            self.journal.add(record)
        except NotSaved as error:
            if not self.unsaved:
                self.notes.append(f"{error}; what is found is kept in memory and written once there is room")
            self.unsaved = str(error)
        else:
            if self.unsaved:
                self.notes.append(f"{self.journal.path} has all that is found again")
            self.unsaved = ""

    def note(self, record: Record, *, fresh: bool) -> None:
        """A case has ended in an xdist worker, which keeps its record; `fresh` is one that it has made itself."""
        if fresh and record.id not in self.finished:
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
        if self.part:
            self.journal.leave()
            return
        if not self.journal.records:
            self.journal.discard()
            return
        records = self.journal.records
        complete = not interrupted and self.expected <= records.keys()
        if self.others_aliases:
            options = {**self.journal.run.options, **self._asked_others}
            self.journal.run = self.journal.run.model_copy(update={"aliases": self.others_aliases, "options": options})
        self.journal.run = self.journal.run.model_copy(update={"wall_s": self.spent_s})
        try:
            path = self.journal.finish(complete)
        except NotSaved as error:
            some = f", but for the last {self.journal.unsaved} that there was no room for"
            what = f"{error}; {self.journal.path.name} beside it has the records{some if self.journal.unsaved else ''}"
            self.unsaved = f"{what}: free some space and give --vram-resume"
            return
        self.unsaved = ""
        update = {"records": list(records.values()), "complete": complete}
        self.written = [ReadRun(path, self.journal.run.model_copy(update=update))]

    def join(self, path: Path, journals: Sequence[Path], workers: int, interrupted: bool, *, only: bool) -> None:
        """Write the run file that takes the place of the journals that xdist workers kept. Where it is the `only` one,
        what a journal had no room for is in it, too.

        Raises:
            RunFileError: where one cannot be read; all are left as they are then.
        """
        read = [ReadRun(journal, read_journal(journal)) for journal in journals]
        there = {record.id for part in read for record in part.records}
        left_out = [record for id, record in self.finished.items() if only and id not in there]
        if parts := [part for part in read if part.records or (left_out and not there)]:
            run = joined(parts, self.order, left_out)
            complete = not interrupted and self.expected <= {record.id for record in run.records}
            options = {**run.options, "xdist_workers": workers}
            run = run.model_copy(update={"complete": complete, "options": options, "wall_s": self.spent_s})
            write_run(path, run)
            self.written.append(ReadRun(path, run))
        for journal in journals:
            journal.unlink()

    def find_base_of_joined(self) -> None:
        """Read what the run of several xdist workers is compared with, as each of them has before its first case."""
        if self.options.base is None or len(self.written) != 1:
            return
        own = [node_id for node_id, id in self.case_ids.items() if self.own_id(node_id) == id]
        for folder in {(self.root / split_node_id(node_id)[0]).parent for node_id in self.case_ids.keys() - set(own)}:
            self.plans(folder)
        self._read_own_thresholds(own)
        head = self.written[0].run.model_copy(update={"records": []})
        self.base = Base(
            self.options.base, head, self.options.results, self.root, self._thresholds, self.written[0].path
        )

    def compare(self, interrupted: bool) -> None:
        """The verdict on the finished run; times that look slower are measured again, unless somebody waits to go.

        Raises:
            NotComparable: where none of the base's cases came to be measured, or the verdict cannot be written.
        """
        if self.base is None or len(self.written) != 1:
            return
        (head,) = self.written
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
        self.comparison_path = save(self.comparison, head.path)
        if stopped:
            raise stopped

    def _confirmation(self, base: Base) -> Confirmation:
        return Confirmation(
            base, self.options, self.root, self.machine, self._jobs, self.node_ids, self.say, self.settings
        )

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
        if self.journal:
            self.journal.close()
        if self._claimed:
            self._claimed.close()
        self._restore()

    @property
    def records(self) -> list[Record]:
        """What the run holds now."""
        return list(self.journal.records.values()) if self.journal else []
