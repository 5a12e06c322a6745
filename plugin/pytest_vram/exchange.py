"""What the xdist workers of one sweep tell each other and their controller: files in a folder of the session."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pytest_vram.measure.channel import Message
from pytest_vram.records.files import new_path, run_path_of, slug
from pytest_vram.records.merging import apart
from pytest_vram.records.schema import Record


@dataclass(frozen=True)
class Planned:
    """What an xdist worker has planned: the ids of its cases in order, and by node id; those that it need not run, as a
    run that it goes on with has them; and the models' aliases."""

    ids: list[str]
    case_ids: dict[str, str]
    known: list[str]
    aliases: dict[str, list[str]]


@dataclass(frozen=True)
class Exchange:
    """The folder. What is written there is whole or not there, and one of several writers is as good as another."""

    folder: Path

    def _write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)

    def claim(self, node_id: str) -> bool:
        """Whether this process runs the test: each is the first one's to ask."""
        path = self.folder / "claims" / _name(node_id)
        path.parent.mkdir(exist_ok=True)
        try:
            path.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def put_plan(self, worker: str, plan: "Planned") -> None:
        """What an xdist worker has planned, before it runs any of it."""
        self._write(f"plans/{worker}.json", json.dumps(asdict(plan)))

    def plans(self) -> list["Planned"]:
        """What those that have started have planned."""
        found = sorted(self.folder.glob("plans/*.json"))
        return [Planned(**json.loads(path.read_text(encoding="utf-8"))) for path in found]

    def put_estimate(self, case_id: str, outcome: Message) -> None:
        """What the simulation of a case said."""
        self._write(f"estimates/{_name(case_id)}.json", json.dumps(outcome))

    def estimate(self, case_id: str) -> Message | None:
        """What the simulation of a case said, where somebody has made it."""
        path = self.folder / "estimates" / f"{_name(case_id)}.json"
        try:
            outcome: Message = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return outcome

    def outputs(self, gpu: str) -> Path:
        """Where GPUs of this name keep the outputs with which others are compared."""
        folder = self.folder / "outputs" / slug(gpu)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def resumed(self, environment: str, find: Callable[[], tuple[Path, list[Record]]]) -> tuple[Path, list[Record]]:
        """What `find` gives to the first xdist worker of an environment (as `apart` has it), for all of them: the run
        file of the sweep that they go on with, and its records that need not be made again."""
        import fcntl  # not where no sweep runs

        name = f"resumed-{_name(environment)}.json"
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # goes with the process
            if (self.folder / name).exists():
                path, *documents = json.loads((self.folder / name).read_text(encoding="utf-8"))
                return Path(path), [Record.model_validate(document) for document in documents]
            run_path, records = find()
            documents = [record.model_dump(mode="json") for record in records]
            self._write(name, json.dumps([str(run_path), *documents]))
            return run_path, records

    def put_journal(self, worker: str, path: Path) -> None:
        """Where an xdist worker keeps its records."""
        self._write(f"journals/{worker}.json", json.dumps(str(path)))

    def runs(self) -> list[Path]:
        """The run files to which the journals belong."""
        found = [json.loads(path.read_text(encoding="utf-8")) for path in self.folder.glob("journals/*.json")]
        return sorted({run_path_of(Path(path)) for path in found})


@dataclass(frozen=True)
class Part:
    """The share of one xdist worker, the `number`-th `of` so many (from 0), in a sweep that began at `began`.

    `mark` is the sweep's own: with it each environment has one name for its run file, whichever worker writes first.
    """

    exchange: Exchange
    worker: str
    number: int
    of: int
    began: str
    mark: str

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> "Part":
        """What the controller told this xdist worker."""
        return cls(Exchange(Path(told["folder"])), **{key: value for key, value in told.items() if key != "folder"})

    def run_path(self, folder: Path, environment: dict[str, Any]) -> Path:
        """The run file of this environment."""
        mark = _name(f"{self.mark} {apart(environment)}")[:4]
        return new_path(folder, environment, self.began, mark)

    def share(self, cases: Iterable[Any]) -> list[Any]:
        """Those of these that this xdist worker estimates for all."""
        return list(cases)[self.number :: self.of]


def _name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
