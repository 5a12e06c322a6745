"""What a comparison of two runs found: the form in which it is shown, saved and read again."""

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pytest_vram.errors import NotOurs, RunFileError, first_problem
from pytest_vram.records.files import read_json

Word = Literal["worse", "vanished", "ambiguous", "not comparable", "new", "better", "same"]
ORDER: tuple[Word, ...] = ("worse", "vanished", "ambiguous", "not comparable", "new", "better", "same")  # worst first
FAILS: frozenset[Word] = frozenset({"worse", "vanished"})

SHOWN = 200  # letters of a value in a title
LONGEST = 2_000  # letters of any other text


def _cut(value: Any) -> Any:
    """Text of strangers that every file and terminal can hold."""
    return value[:LONGEST].encode("utf-8", "replace").decode() if isinstance(value, str) else value


Line = Annotated[str, BeforeValidator(_cut)]
Figure = Annotated[float, Field(allow_inf_nan=False, gt=-1e18, lt=1e18)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


class Difference(_Part):
    """A key whose value differs between two runs; the values as text."""

    key: Line
    base: Line
    head: Line

    @classmethod
    def of(cls, key: str, base: Any, head: Any) -> "Difference":
        """From values of any type, which strangers may have written."""
        return cls(key=key, base=_text(base), head=_text(head))


def _text(value: Any) -> str:
    return "not known" if value is None else value[:SHOWN] if isinstance(value, str) else json.dumps(value)[:SHOWN]


class Change(_Part):
    """One metric of one case, by the key that it has in a record.

    `base` and `head` are bytes or seconds, None for what is no number; `allowed` is the difference up to which they are
    the same. `reason` says why it is no plain comparison of two figures. `workers` are the medians of the workers that
    decided about a time, base's and head's; `again` says whether both were measured again for it.
    """

    metric: Line
    verdict: Word
    base: Figure | None = None
    head: Figure | None = None
    allowed: Figure | None = None
    reason: Line = ""
    workers: tuple[list[Figure], list[Figure]] | None = None
    again: bool = False


class CaseComparison(_Part):
    """What became of one case: the worst of its metrics, or that one side lacks it."""

    id: Line
    verdict: Word
    reason: Line = ""
    changes: list[Change] = []


class Side(_Part):
    """One of the two runs."""

    name: Line
    commit: Line | None = None
    dirty: bool | None = None
    started: Line | None = None
    gpu: Line | None = None


class Comparison(_Part):
    """All of it. `across` are the keys that were lifted and do differ; `remarks` what else differs."""

    kind: Literal["pytest-vram comparison"] = "pytest-vram comparison"
    schema_version: Literal[1] = Field(default=1, alias="schema")
    base: Side
    head: Side
    sweep: Line
    strict: bool = False
    across: list[Difference] = []
    remarks: list[Difference] = []
    notes: list[Line] = []
    cases: list[CaseComparison] = []

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    def counts(self) -> Counter[Word]:
        """How many cases have each verdict."""
        return Counter(case.verdict for case in self.cases)

    @property
    def fails(self) -> frozenset[Word]:
        """The verdicts that stop a merge."""
        return FAILS | {"ambiguous"} if self.strict else FAILS

    @property
    def failed(self) -> bool:
        """Whether a merge should be stopped."""
        return any(self.counts()[word] for word in self.fails)


def read_comparison(path: Path) -> Comparison:
    """A saved comparison, which strangers may have written.

    Raises:
        NotOurs: for a JSON file that is something else.
        RunFileError: naming the file and the key.
    """
    document = read_json(path)
    if not isinstance(document, dict) or document.get("kind") != "pytest-vram comparison":
        raise NotOurs(f"{path}: is no comparison that pytest-vram saved; give BASE and HEAD to compare two runs")
    try:
        return Comparison.model_validate(document)
    except ValidationError as error:
        raise RunFileError(first_problem(error, path)) from error


def comparison_json(comparison: Comparison) -> str:
    """The comparison as it is saved."""
    document = comparison.model_dump(mode="json", by_alias=True)
    document |= {"counts": dict(comparison.counts()), "failed": comparison.failed}
    return json.dumps(document, indent=1, allow_nan=False) + "\n"
