"""What `--vram-resume` goes on with, what it refuses, and which cases are run again."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pytest_vram.errors import UsageError
from pytest_vram.records.files import Journal, claim, write_run
from pytest_vram.records.resuming import Unfinished, find_unfinished, is_done, kept, unfinished
from pytest_vram.records.schema import NOT_FOR_MEMORY, NOT_SEARCHED, SEARCH_INTERRUPTED, Failure, Record, Run
from tests.records.test_files import a_run, batch, journal_lines
from tests.records.test_schema import record


def test_unfinished_runs_the_newest_first(tmp_path: Path) -> None:
    def name(day: int, suffix: str) -> Path:
        return tmp_path / f"202611{day}T210000Z_1a2b3c4_9f0e{suffix}"

    lines = "".join(journal_lines(tmp_path, batch(1)))
    for day in (25, 21, 24):
        name(day, ".jsonl").write_text(lines, encoding="utf-8")
    write_run(name(20, ".json"), a_run(complete=False))
    write_run(name(23, ".json"), a_run())
    write_run(name(24, ".json"), a_run(complete=False))  # the journal beside it goes on with it
    assert [path.name for path, _ in unfinished(tmp_path)] == [
        name(25, ".jsonl").name,
        name(24, ".jsonl").name,
        name(21, ".jsonl").name,
        name(20, ".json").name,
    ]


@pytest.mark.parametrize("content", ["not ours", "[]\n", "null\n", "{}\n"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_what_is_no_run_is_not_unfinished(suffix: str, content: str, tmp_path: Path) -> None:
    (tmp_path / f"run{suffix}").write_text(content, encoding="utf-8")
    assert list(unfinished(tmp_path)) == []


def test_no_folder_has_nothing_unfinished(tmp_path: Path) -> None:
    assert list(unfinished(tmp_path / "none")) == []


# Which cases are run again


def failed(status: str) -> Record:
    return batch(1, status=status, failure=Failure(message="x"), time={})


def without_need(reason: str) -> Record:
    return batch(1, unavailable={"memory.need_bytes": reason})


@pytest.mark.parametrize(
    ("found", "done"),
    [
        (batch(1), True),
        (failed("oom"), True),
        (failed("error"), False),
        (failed("timeout"), False),
        (batch(1, status="skipped", reason="not here", time={}), True),
        (without_need(NOT_SEARCHED), True),
        (without_need("a cache grows for more steps than a probe takes"), True),
        (without_need(SEARCH_INTERRUPTED), False),
        (without_need(f"{SEARCH_INTERRUPTED}; it ran out of memory under 499 MiB"), False),
        (without_need(f"within 550 MiB {NOT_FOR_MEMORY}: the worker was killed by signal 9"), False),
    ],
    ids=[
        *("ok", "oom", "error", "timeout", "skipped", "not searched", "no need", "interrupted", "within a search"),
        "a probe died",
    ],
)
def test_what_has_a_result_is_not_run_again(found: Record, done: bool, tmp_path: Path) -> None:
    assert is_done(found) is done
    write_run(tmp_path / "run.json", a_run([found, batch(2)]))
    assert len(list(unfinished(tmp_path))) == (0 if done else 1)
    write_run(tmp_path / "run.json", a_run([found, batch(2)], complete=False))
    resumed = find_unfinished(tmp_path, None)
    assert resumed is not None
    with closing(resumed):
        assert kept(resumed, resumed.run, {}) == ([found] if done else []) + [batch(2)]


# What is refused


def refusal(old: dict[str, Any], new: dict[str, Any], tmp_path: Path) -> str:
    """Why a run that was made so is not gone on with by one that is made so."""
    write_run(tmp_path / "run.json", made(old))
    found = find_unfinished(tmp_path, None)
    assert found is not None
    with closing(found), pytest.raises(UsageError) as caught:
        kept(found, made(new), {one.id: one.case for one in made(new).records})
    message = str(caught.value)
    assert message.startswith(f"--vram-resume: {tmp_path / 'run.json'} ")
    assert "\n" not in message
    return message


def made(changes: dict[str, Any]) -> Run:
    measured = record(id="sdxl/fp16/1024x1024/b1", case={"batch_size": 1, "steps": changes.get("steps", 30)})
    run = a_run([measured], complete=False)
    environment = {**run.environment, **changes.get("environment", {})}
    options = {"workers": 1, "rounds": None, "need": True, "difference": True, **changes.get("options", {})}
    return run.model_copy(
        update={"environment": environment, "options": options, "sweep": changes.get("sweep", "default")}
    )


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("commit", "1a2b3c4", "5d6e7f8"),
        ("dirty", False, True),
        ("changes", "aaaa", "bbbb"),
        ("gpu", "NVIDIA H100", "NVIDIA H200"),
        ("mig", None, "1g.10gb"),
        ("power_limit_w", 700.0, 350.0),
        ("driver", "580.1", "590.2"),
        ("torch", "2.11.0", "2.12.0"),
        ("diffusers", "0.42.1", "0.43.0"),
        ("variables", {}, {"CUDA_LAUNCH_BLOCKING": "1"}),
        ("start", "fork", "spawn"),
    ],
)
def test_another_environment_is_refused(key: str, old: Any, new: Any, tmp_path: Path) -> None:
    message = refusal({"environment": {key: old}}, {"environment": {key: new}}, tmp_path)
    assert f"was made with {key} {old}, this is {new}; leave --vram-resume out to start a new run" in message


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ({"sweep": "quick"}, {}, "is of the sweep 'quick'; give --vram-sweep quick, or leave --vram-resume out"),
        ({"steps": 8}, {"steps": 30}, "measured sdxl/fp16/1024x1024/b1 with other steps or weights"),
        ({"options": {"workers": 3}}, {}, "made with workers 3, this is 1; give the same --vram-workers"),
        ({"options": {"rounds": 5}}, {}, "made with rounds 5, this is None; give the same --vram-rounds"),
        ({"options": {"need": False}}, {}, "made with need False, this is True; give the same --vram-no-need"),
        ({"options": {"difference": False}}, {}, "difference False, this is True; give the same --vram-no-difference"),
        ({"options": {"limit_bytes": 8}}, {}, "limit_bytes 8, this is None; give the same --vram-limit"),
        ({"options": {"overrides": {"models": ["sdxl"]}}}, {}, "made with overrides {'models': ['sdxl']}, this is"),
        ({"options": {"shard": "1/2"}}, {}, "is shard 1/2; give --vram-shard 1/2, or leave"),
        ({}, {"options": {"shard": "1/2"}}, "is no shard; leave --vram-resume out"),
        ({"options": {"cases": ["a"]}}, {}, "is a shard of other cases"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_another_sweep_is_refused(old: dict[str, Any], new: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert said in refusal(old, new, tmp_path)


def test_options_that_an_older_version_did_not_write_are_not_asked_for(tmp_path: Path) -> None:
    write_run(tmp_path / "run.json", a_run([batch(1)], complete=False))
    found = find_unfinished(tmp_path, None)
    assert found is not None
    with closing(found):
        assert kept(found, a_run(options={"need": False, "limit_bytes": None}), {}) == [batch(1)]


# Which run it is


def path_of(found: Unfinished | None) -> Path:
    assert found is not None
    found.close()
    return found.path


def test_a_sweep_that_still_runs_is_passed_over_and_said(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "20261124T210000Z_a.json", a_run())
    with pytest.raises(UsageError, match=r"--vram-resume: .*_a.jsonl belongs to a sweep that is still running; leave"):
        find_unfinished(tmp_path, None)
    write_run(tmp_path / "20261123T210000Z_b.json", a_run([batch(1)], complete=False))
    found = find_unfinished(tmp_path, None)
    assert path_of(found).name == "20261123T210000Z_b.json"
    assert found is not None
    assert found.notes == ["--vram-resume: passed over 20261124T210000Z_a.jsonl: another sweep is writing it"]
    journal.close()
    assert path_of(find_unfinished(tmp_path, None)) == journal.path


def test_two_that_resume_at_once_take_a_run_each(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / f"{name}.json", a_run([batch(1)], complete=False))
    first, second = find_unfinished(tmp_path, None), find_unfinished(tmp_path, None)
    assert first is not None
    assert second is not None
    assert (first.path.name, second.path.name) == ("b.json", "a.json")
    journal = Journal(first.path, first.run)  # which replaces what the first has claimed
    assert claim(journal.path) is None
    for file in (first, second, journal):
        file.close()


def test_a_torn_last_line_is_said(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("".join(journal_lines(tmp_path, batch(1), batch(2)))[:-20], encoding="utf-8")
    found = find_unfinished(tmp_path, None)
    assert path_of(found) == path
    assert found is not None
    assert found.notes == ["--vram-resume: the last line of run.jsonl was cut off: its case is run again"]
    assert len(found.run.records) == 1
