"""Several run files as one: the command merge, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pytest_vram.records.files import Journal, read_run, write_run
from pytest_vram.records.schema import Record, Run
from tests.compare.test_comparing import a_run
from tests.records.test_schema import FAILURE, MIB, record
from tests.test_report_command import Command, pytest_vram_command

__all__ = ["pytest_vram_command"]

CASES = [f"b{size}" for size in (1, 2, 3, 4)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def batch(size: int, **changes: Any) -> Record:
    return record(id=f"b{size}", case={"batch_size": size}, **changes)


def put(name: str, *records: Record, shard: str | None = None, day: int = 23, **changes: Any) -> Path:
    """A run of a day in November; `shard` is one of four cases."""
    options = changes.pop("options", {})
    if shard:
        number, of = map(int, shard.split("/"))
        mine = CASES[number - 1 :: of]
        options = {"shard": shard, "cases": CASES, "deselected": sorted({*CASES, "b9"} - set(mine)), **options}
    environment = {"started": f"2026-11-{day}T00:00:00+00:00", "host": f"host{day}", **changes.pop("environment", {})}
    path = Path(f"{name}.json")
    write_run(path, a_run(*records, environment=environment, options=options, **changes).run)
    return path


@pytest.fixture
def merged(pytest_vram_command: Command) -> Any:
    """What merging gives: the run, and the lines before its name."""

    def call(*paths: Path) -> tuple[Run, str]:
        code, out, err = pytest_vram_command("merge", *paths, "-o", "out.json")
        assert (code, err) == (0, "")
        said, _, name = out.rstrip("\n").rpartition("\n")
        assert name == "out.json"
        return read_run(Path("out.json")), said

    return call


@pytest.fixture
def refusal(pytest_vram_command: Command) -> Any:
    """The one line with which merging is refused."""

    def call(*arguments: str | Path) -> str:
        code, out, err = pytest_vram_command("merge", *arguments)
        assert (code, out) == (2, "")
        assert err.count("\n") == 1
        return err.removeprefix("pytest-vram: ").rstrip("\n")

    return call


def test_all_shards_are_the_sweep_in_its_order(merged: Any) -> None:
    second = put("a", batch(2), batch(4), shard="2/2", day=20, aliases={"x": ["y"]})
    first = put("b", batch(1), batch(3), shard="1/2", day=21)
    run, said = merged(first, second)
    assert run.complete
    assert [found.id for found in run.records] == CASES
    assert run.aliases == {"x": ["y"]}
    assert said == "4 cases of 2 runs; 0 duplicates dropped"
    assert run.options == {
        "device": "cuda",
        "tests": ["bench"],
        "overrides": {},
        "deselected": ["b9"],
        "selection": {},
    }


def test_each_file_keeps_what_it_alone_said(merged: Any) -> None:
    first = put("a", batch(1), shard="1/2", day=20, environment={"gpu_uuid": "aa", "cpus": 8})
    second = put("b", batch(2), shard="2/2", day=21, environment={"gpu_uuid": "bb", "driver": "580.2", "cpus": 9})
    environment = merged(second, first)[0].environment
    assert environment["started"] == "2026-11-20T00:00:00+00:00"
    assert (environment["host"], environment["gpu_uuid"]) == ("host20, host21", "aa, bb")
    assert environment["driver"] == "580.159.04, 580.2"
    assert environment["cpus"] is None
    assert environment["torch"] == "2.11.0"
    assert environment["merged"] == [
        {
            "file": f"{name}.json",
            "shard": f"{number}/2",
            "complete": True,
            "records": 1,
            "cpus": 7 + number,
            "driver": driver,
            "gpu_uuid": uuid,
            "host": f"host{19 + number}",
            "started": f"2026-11-{19 + number}T00:00:00+00:00",
        }
        for number, name, uuid, driver in ((1, "a", "aa", "580.159.04"), (2, "b", "bb", "580.2"))
    ]


def test_a_missing_or_unfinished_shard_leaves_the_run_incomplete(merged: Any) -> None:
    parts = put("a", batch(1), shard="1/4"), put("b", batch(2), shard="2/4", complete=False)
    run, said = merged(*parts, put("c", batch(3), shard="3/4"))
    assert not run.complete
    assert run.options["deselected"] == ["b9"], "b4 was asked for, and is missing"
    assert said.endswith("\nnot complete: no complete run of shard 2/4, 4/4")


def test_a_second_try_completes_a_shard(merged: Any) -> None:
    broken = put("a", batch(1), shard="1/2", day=20, complete=False)
    again = put("b", batch(1), batch(3), shard="1/2", day=21)
    run, said = merged(put("c", batch(2), batch(4), shard="2/2"), again, broken)
    assert run.complete
    assert said == "4 cases of 3 runs; 1 duplicates dropped"


def test_runs_that_are_no_shards_are_merged_by_file(merged: Any) -> None:
    first = put("a", batch(4), day=20, options={"deselected": ["b1"], "selection": {"keyword": "b4"}})
    second = put("b", batch(1), day=21, options={"deselected": ["b4"], "selection": {"keyword": "b1"}}, complete=False)
    run, said = merged(second, first)
    assert [found.id for found in run.records] == ["b4", "b1"]
    assert (run.options["deselected"], run.options["selection"]) == ([], {})
    assert not run.complete
    assert said.endswith("\nnot complete: a run of these is not")
    third = put("c", batch(8), day=22, options={"deselected": ["b4"]})
    more = [part["file"] for part in merged_again(Path("out.json"), third).environment["merged"]]
    assert more == ["a.json", "b.json", "c.json"]


def merged_again(*paths: Path) -> Run:
    from pytest_vram.records.merging import merge
    from pytest_vram.records.reading import read_runs

    return merge(read_runs(paths)[0]).run


def need(mib: int | None, **changes: Any) -> Record:
    return batch(1, memory={"need_bytes": mib and mib * MIB}, **changes)


def test_of_duplicates_the_searched_need_stays_else_the_newer(merged: Any) -> None:
    run, said = merged(put("a", need(12000), day=20), put("b", need(None), day=21), put("c", need(12064), day=22))
    assert [found.memory.need_bytes for found in run.records] == [12064 * MIB]
    assert said == "1 cases of 3 runs; 2 duplicates dropped"
    assert merged_again(Path("a.json"), Path("b.json")).records == [need(12000)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"memory": {"need_bytes": 12165 * MIB}}, f"need_bytes: {12100 * MIB} there, {12165 * MIB} here"),
        ({"status": "oom", "failure": FAILURE}, "status: ok there, oom here"),
        ({"method": "estimated"}, "method: measured there, estimated here"),
        ({"case": {"steps": 9}}, "another case, in steps or weights"),
    ],
)
def test_duplicates_that_disagree_are_refused(changes: dict[str, Any], said: str, refusal: Any) -> None:
    one, other = put("a", record(), day=20), put("b", record(**changes), day=21)
    found = refusal(one, other)
    assert found.startswith(f"b.json: disagrees with a.json about sdxl/fp16/1024x1024/b1: {said}")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sweep": "quick"}, "sweep: default there, quick here"),
        ({"environment": {"commit": "5d6e7f8"}}, "commit: 1a2b3c4 there, 5d6e7f8 here"),
        ({"environment": {"dirty": True}}, "dirty: none there, True here"),
        ({"environment": {"gpu": "NVIDIA H200"}}, "gpu: NVIDIA H100 80GB HBM3 there, NVIDIA H200 here"),
        ({"environment": {"torch": "2.12.0"}}, "torch: 2.11.0 there, 2.12.0 here"),
        ({"environment": {"diffusers": "0.42.1"}}, "diffusers: none there, 0.42.1 here"),
        ({"environment": {"driver": "590.1"}}, "driver: 580 there, 590 here"),
        ({"environment": {"variables": {"X": "1"}}}, "variables: none there, {'X': '1'} here"),
        ({"options": {"device": "cpu"}}, "device: cuda there, cpu here"),
        ({"options": {"overrides": {"steps": 2}}}, "overrides: none there, {'steps': 2} here"),
        ({"options": {"tests": ["x" * 200]}}, "..."),
    ],
)
def test_what_is_not_of_one_sweep_is_refused(changes: dict[str, Any], said: str, refusal: Any) -> None:
    found = refusal(put("a", batch(1), day=20), put("b", batch(2), day=21, **changes))
    assert found.startswith("b.json: cannot be merged with a.json: ")
    assert said in found


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"shard": "3/4"}, "shards: 2 there, 4 here"),
        ({}, "shards: 2 there, none here"),
        ({"shard": "2/2", "options": {"cases": ["b1", "b2"]}}, "cases: ['b1', 'b2', 'b3', 'b4'] there, ['b1', 'b2']"),
    ],
)
def test_shards_of_another_whole_are_refused(other: dict[str, Any], said: str, refusal: Any) -> None:
    found = refusal(put("a", batch(1), shard="1/2", day=20), put("b", batch(2), day=21, **other))
    assert f"b.json: cannot be merged with a.json: {said}" in found


def test_one_run_is_nothing_to_merge(refusal: Any) -> None:
    assert refusal(put("a", batch(1)), "./a.json") == "merge: a.json: is one run; name two or more"


def test_nothing_is_overwritten(refusal: Any) -> None:
    paths = put("a", batch(1)), put("b", batch(2))
    before = paths[0].read_bytes()
    assert refusal(*paths, "--output", "a.json").startswith("--output: a.json is there; nothing is overwritten")
    assert refusal(*paths, "--output", "a.json/b.json").startswith("--output: a.json/b.json ")
    assert paths[0].read_bytes() == before


def test_a_record_that_cannot_be_true_and_a_shard_that_is_none_are_refused(refusal: Any) -> None:
    paths = put("a", batch(1)), put("b", batch(2))
    document = json.loads(paths[1].read_text(encoding="utf-8"))
    document["vram"]["records"][0]["memory"]["weights_bytes"] = -1
    paths[1].write_text(json.dumps(document), encoding="utf-8")
    assert "weights_bytes" in refusal(*paths)
    document["vram"] |= {"records": [], "options": {"shard": [3]}}
    paths[1].write_text(json.dumps(document), encoding="utf-8")
    assert refusal(*paths) == "b.json: options.shard: [3] is no shard"
    document["vram"] |= {"schema": 2}
    paths[1].write_text(json.dumps(document), encoding="utf-8")
    assert refusal(*paths).startswith("b.json: schema: 2 is newer than this pytest-vram reads (1)")


def test_a_journal_is_an_incomplete_part(merged: Any) -> None:
    part = Path("part.json")
    put("a", batch(1), shard="1/2")
    journal = Journal(part, read_run(put("b", batch(2), shard="2/2")).model_copy(update={"records": [batch(2)]}))
    run, _ = merged(Path("a.json"), journal.path)
    assert [found.id for found in run.records] == ["b1", "b2"]
    assert not run.complete
    journal.finish(complete=True)


def test_the_new_file_goes_where_the_runs_of_its_gpu_are(pytest_vram_command: Command) -> None:
    code, out, _ = pytest_vram_command("merge", put("a", batch(1)), put("b", batch(2)))
    assert code == 0
    (path,) = Path("results").glob("nvidia-h100-80gb-hbm3/*_1a2b3c4_*.json")
    assert out.splitlines()[-1] == str(path)


def test_pytest_benchmark_and_compare_read_it(merged: Any, pytest_vram_command: Command) -> None:
    whole = put("whole", *map(batch, (1, 2, 3, 4)))
    merged(put("a", batch(1), batch(3), shard="1/2", day=20), put("b", batch(2), batch(4), shard="2/2", day=21))
    command = [sys.executable, "-m", "pytest_benchmark", "compare", "out.json"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(name in said for name in CASES)
    document = json.loads(Path("out.json").read_text(encoding="utf-8"))
    assert document["machine_info"]["node"] == "host20, host21"
    assert document["commit_info"]["id"] == "1a2b3c4"
    assert [one["name"] for one in document["benchmarks"]] == CASES
    assert pytest_vram_command("compare", whole, "out.json")[0] == 0
