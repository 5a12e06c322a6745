"""A sweep in parts: `--vram-shard` from the option to the run file, resumed and compared."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pytest_vram.cases.shard import Shard
from pytest_vram.cases.thresholds import Limits
from pytest_vram.compare.comparing import compare
from pytest_vram.compare.finding import Like, find_run
from pytest_vram.errors import NotComparable, UsageError
from pytest_vram.planning import Options
from pytest_vram.records.files import read_run, write_run
from pytest_vram.records.reading import ReadRun
from pytest_vram.session import SweepSession
from tests.compare.test_comparing import a_run
from tests.records.test_schema import record
from tests.test_plugin import HERE, TEST, command, project, run
from tests.test_report_command import Command, pytest_vram_command, uncharted

__all__ = ["project", "pytest_vram_command", "uncharted"]

B1, B2, SLICED_B1, SLICED_B2 = (
    f"tiny-sd/{flags}/32x32/b{batch}" for flags in ("fp32", "fp32+vae_slicing") for batch in (1, 2)
)
OWN = "def test_a(vram): pass\n\ndef test_b(vram): pass\n"


def collected(project: pytest.Pytester, *options: str) -> list[str]:
    """The ids of the cases that would run, and the names of other tests."""
    result = run(project, "--collect-only", "-q", *options)
    assert result.ret == pytest.ExitCode.OK, str(result.stdout)
    nodes = [line.partition("::")[2] for line in result.outlines if "::" in line]
    return [re.sub(r"^test_generation\[(.*)\]$", r"\1", node) for node in nodes]


@pytest.mark.parametrize("count", [1, 2, 5, 12, 97])
def test_shards_are_disjoint_balanced_and_together_all(count: int) -> None:
    ids = [f"case {number}" for number in range(count)]
    for of in range(1, count + 1):
        shards = [Shard(number, of).take(ids) for number in range(1, of + 1)]
        assert sorted(id for shard in shards for id in shard) == sorted(ids)
        assert {len(shard) for shard in shards} <= {count // of, -(-count // of)}
        assert all(ids.index(id) % of == place for place, shard in enumerate(shards) for id in shard)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("0/8", "there is no shard 0 of 8; write 1/8 to 8/8"),
        ("9/8", "there is no shard 9 of 8; write 1/8 to 8/8"),
        ("0/0", "there is no shard 0 of 0; write 1/1"),
        *((text, "is no shard; write 2/8") for text in ("2/x", "2", "", "2/", "-1/8", "2/8/1", "2 / 8", "²/8")),
        ("2/8\n", r"'2/8\n' is no shard"),
    ],
)
def test_a_bad_shard_is_said_in_one_line(text: str, right: str) -> None:
    with pytest.raises(UsageError) as caught:
        Shard.parse(text)
    assert str(caught.value).startswith("--vram-shard: ")
    assert right in str(caught.value)
    assert "\n" not in str(caught.value)


def test_more_shards_than_cases_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^--vram-shard: 5/5: there are only 4 cases; write /4, or fewer shards$"):
        Shard(5, 5).take([B1, B2, SLICED_B1, SLICED_B2])


def test_a_shard_is_a_place_in_what_the_options_leave(project: pytest.Pytester) -> None:
    assert collected(project, "--vram-shard=1/2") == [B1, SLICED_B1]
    assert collected(project, "--vram-shard=2/2", "-k", "b1") == [SLICED_B1]
    assert collected(project, "--vram-shard=2/2", "--vram-batch-sizes=2,1,4", "--vram-optimizations=fp32") == [B1]


@pytest.mark.parametrize(("shard", "said"), [("3/2", "1/2 to 2/2"), ("1/5", "write /4")])
def test_bad_usage_ends_before_the_first_case(project: pytest.Pytester, shard: str, said: str) -> None:
    result = run(project, f"--vram-shard={shard}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (error,) = [line for line in (*result.outlines, *result.errlines) if line.startswith("ERROR")]
    assert error.startswith("ERROR: --vram-shard: ")
    assert not list(project.path.glob("results/*"))
    assert said in error


def test_pipelines_of_ones_own_follow_the_sweep(project: pytest.Pytester) -> None:
    project.makepyfile(test_it=TEST, test_own=OWN)
    sharded = "--vram-shard=2/3", "--vram-device=cpu"
    assert collected(project, *sharded) == [B2, "test_a"]
    assert collected(project, "--vram-shard=2/3") == [B2, "test_a", "test_b"], "no estimate measures them"


def test_the_places_do_not_follow_the_order_of_the_tests(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny-sd.toml").write_text((HERE / "models" / "tiny-sd.toml").read_text())
    (tmp_path / "matrix.toml").write_text((HERE / "matrix.toml").read_text())
    session = SweepSession(Options(shard=Shard(1, 3)), tmp_path, lambda text: None)
    session.plans(tmp_path)
    own = session.own_id("t.py::test_a"), session.own_id("t.py::test_b")
    kept = session.take_shard([SLICED_B2, B2, B1, SLICED_B1, B1], ["t.py::test_b", "t.py::test_a"])
    assert kept == {B1, SLICED_B2}
    assert session.asked()["cases"] == [B1, B2, SLICED_B1, SLICED_B2, *own]


def resumed(project: pytest.Pytester, options: dict[str, Any], *given: str) -> str:
    """What is said where the newest unfinished run has these options."""
    folder = project.path / "results" / "estimated"
    folder.mkdir(parents=True)
    unfinished = a_run(complete=False, options=options, environment={}).run
    write_run(folder / "run.json", unfinished)
    result = run(project, "--vram-resume", *given)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    (error,) = [line for line in (*result.outlines, *result.errlines) if line.startswith("ERROR")]
    return error


def test_another_shard_is_not_resumed(project: pytest.Pytester) -> None:
    error = resumed(project, {"shard": "2/2"}, "--vram-shard=1/2")
    assert error.endswith("run.json is shard 2/2; give --vram-shard 2/2, or leave --vram-resume out to start a new run")


def test_a_shard_does_not_go_on_with_a_whole_sweep(project: pytest.Pytester) -> None:
    assert "run.json is no shard; leave --vram-resume out" in resumed(project, {}, "--vram-shard=1/2")


def test_a_whole_sweep_does_not_go_on_with_a_shard(project: pytest.Pytester) -> None:
    assert "run.json is shard 2/2; give --vram-shard 2/2" in resumed(project, {"shard": "2/2"})


def sharded(*records: Any, shard: str = "1/2", **options: Any) -> ReadRun:
    cases = ["b1", "b2", "b4"]
    return a_run(*records, options={"shard": shard, "cases": cases, "deselected": ["b2"], **options})


def test_what_another_shard_has_did_not_vanish() -> None:
    base = a_run(record(id="b1"), record(id="b2"), record(id="b4"))
    found = compare(base, sharded(record(id="b1")), Limits())
    assert {case.id: case.verdict for case in found.cases} == {"b1": "same", "b4": "vanished"}
    assert "the head is shard 1/2 of its sweep" in found.notes


def test_a_shard_of_new_cases_alone_is_compared() -> None:
    base = a_run(record(id="b2"))
    found = compare(base, sharded(record(id="b1"), record(id="b4")), Limits())
    assert [case.verdict for case in found.cases] == ["new", "new"]
    with pytest.raises(NotComparable, match="has no case of"):
        compare(a_run(record(id="b8")), sharded(record(id="b1")), Limits())


def test_another_shard_is_not_the_base_that_is_meant(tmp_path: Path) -> None:
    for name, options in {"a": {}, "b": {"shard": "1/2"}, "c": {"shard": "2/2"}}.items():
        started = f"2026-11-2{'abc'.index(name)}T00:00:00+00:00"
        kept = a_run(record(), environment={"started": started}, options=options)
        write_run(tmp_path / f"{name}.json", kept.run)

    def found(shard: str | None) -> str:
        like = Like("NVIDIA H100 80GB HBM3", "cuda", "default", shard=shard)
        return find_run("latest", tmp_path, tmp_path, like).name

    assert [found(shard) for shard in (None, "1/2", "2/2", "3/3")] == ["a.json", "b.json", "c.json", "a.json"]
    assert find_run("latest", tmp_path, tmp_path).name == "a.json"


def test_two_shards_run_side_by_side_become_one_run(
    project: pytest.Pytester, pytest_vram_command: Command, uncharted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = [
        subprocess.Popen(command(f"--vram-shard={number}/2", *more), cwd=project.path, stdout=subprocess.DEVNULL)
        for number, more in ((2, ["-n1"]), (1, []))
    ]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    runs = {read_run(path).options["shard"]: read_run(path) for path in project.path.glob("results/estimated/*.json")}
    assert sorted(runs) == ["1/2", "2/2"]
    assert all(one.complete and one.options["cases"] == [B1, B2, SLICED_B1, SLICED_B2] for one in runs.values())
    assert [one.id for one in runs["1/2"].records] == [B1, SLICED_B1]
    assert runs["2/2"].options["deselected"] == sorted([B1, SLICED_B1])

    monkeypatch.chdir(project.path)
    code, out, _ = pytest_vram_command("merge", "results", "--output", "whole.json")
    assert (code, out) == (0, "4 cases of 2 runs; 0 duplicates dropped\nwhole.json\n")
    whole = read_run(project.path / "whole.json")
    assert whole.complete
    assert [one.id for one in whole.records] == [B1, B2, SLICED_B1, SLICED_B2]
    assert whole.aliases == {"tiny-sd": ["tiny"]}

    code, out, _ = pytest_vram_command("report", "whole.json", "-o", "made")
    assert code == 0
    assert "tiny-sd" in (project.path / "made" / "HARDWARE.md").read_text(encoding="utf-8")
    assert pytest_vram_command("check", "made/HARDWARE.md")[0] == 0
    (first,) = [path for path in project.path.glob("results/*/*.json") if read_run(path).options["shard"] == "1/2"]
    code, out, _ = pytest_vram_command("compare", "whole.json", first, "--format", "json")
    assert code == 0
    assert [case["verdict"] for case in json.loads(out)["cases"]] == ["same", "same"]
