"""The run that somebody means: a file, a folder, a commit, or the latest."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pytest_vram.compare.finding import Like, find_run, read_one
from pytest_vram.errors import RunFileError
from pytest_vram.records.files import Refused
from tests.records.test_reading import FOREIGN, foreign, journal, put
from tests.records.test_schema import facts

GPU = "NVIDIA H100 80GB HBM3"
CUDA = Like(GPU, "cuda", "default")
GIT = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}


def git(folder: Path, *arguments: str) -> str:
    """What git says in a repository of nobody in particular."""
    command = ["git", "-C", str(folder), "-c", "user.name=Ada", "-c", "user.email=ada@example.com", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=GIT).stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three commits, of which the first is tagged twice and the last a branch's."""
    folder = tmp_path_factory.mktemp("repository")
    git(folder, "init", "--quiet", "--initial-branch=main")
    for number in range(3):
        git(folder, "commit", "--quiet", "--allow-empty", "--message", f"commit {number}")
    git(folder, "tag", "v1", "HEAD~2")
    git(folder, "tag", "--annotate", "--message", "first", "v1.0", "HEAD~2")
    return folder


def a_file(path: Path, day: int, **changes: Any) -> Path:
    """A run file of a day in November, as a session names it; `gpu`, `device`, `commit`, `dirty`, `deselected` in
    `changes`."""
    environment = {
        "gpu": GPU,
        "commit": "1a2b3c4",
        **{k: changes.pop(k) for k in ("gpu", "commit", "dirty") if k in changes},
    }
    options = {
        "device": changes.pop("device", "cuda"),
        **{k: changes.pop(k) for k in ("deselected",) if k in changes},
    }
    known = {"environment": environment, "options": options, **changes}
    return put(path / f"202611{day:02}T000000Z_1a2b3c4_0000.json", facts(), **known)


def found(name: str | Path, results: Path, root: Path | None = None, like: Like | None = None) -> Path:
    return find_run(str(name), results, root or results, like).path


def refusal(name: str, results: Path, root: Path | None = None, like: Like | None = None) -> str:
    with pytest.raises(RunFileError) as caught:
        find_run(name, results, root or results, like)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# A file


def test_a_named_file_is_read_whatever_the_other_run_is(tmp_path: Path) -> None:
    path = put(tmp_path / "mine.json", facts(), complete=False, sweep="quick")
    run = find_run(str(path), tmp_path / "results", tmp_path, CUDA)
    assert (run.path, run.run.complete, len(run.records)) == (path, False, 1)


def test_a_named_journal_is_read(tmp_path: Path) -> None:
    path = journal(tmp_path / "run.jsonl", facts(), facts(id="b4", time={}))
    run = find_run(str(path), tmp_path, tmp_path)
    assert (len(run.records), run.run.complete) == (1, False)
    assert run.refused == (Refused("b4", "b4: status ok with no rounds"),)


def test_refused_records_are_kept_with_the_ids_they_give_themselves(tmp_path: Path) -> None:
    path = put(tmp_path / "run.json", facts(), facts(id="b4", time={}), None, {"id": 3}, {"id": "b8"})
    run = read_one(path)
    assert len(run.records) == 1
    assert [refused.id for refused in run.refused] == ["b4", None, None, "b8"]
    assert "no rounds" in run.refused[0].problem


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[]", "vram"),
        (json.dumps(FOREIGN), "vram"),
        ('{"vram": {}}', "environment"),
    ],
)
def test_a_named_file_that_is_broken_is_one_line(content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text(content, encoding="utf-8")
    a_file(tmp_path, 1)
    line = refusal(str(tmp_path / "torn.json"), tmp_path)
    assert line.startswith(f"{tmp_path / 'torn.json'}: ")
    assert problem in line


def test_a_saved_comparison_is_no_run(tmp_path: Path) -> None:
    foreign(tmp_path / "a.json", {"kind": "pytest-vram comparison", "schema": 1})
    assert "no run file" in refusal(str(tmp_path / "a.json"), tmp_path)


# A folder


def test_of_a_folder_the_newest_finished_run(tmp_path: Path) -> None:
    expected = a_file(tmp_path, 2)
    a_file(tmp_path, 1)
    a_file(tmp_path, 3, complete=False)
    journal(tmp_path / "20261104T000000Z_1a2b3c4_0000.jsonl", facts())
    assert found(tmp_path, tmp_path / "results") == expected


def test_a_folder_is_searched_one_level_of_folders_deep(tmp_path: Path) -> None:
    a_file(tmp_path, 1)
    expected = a_file(tmp_path / "gpu", 2)
    a_file(tmp_path / "gpu" / "comparisons", 3)
    assert found(tmp_path, tmp_path / "results") == expected
    assert found(tmp_path / "gpu", tmp_path / "results").parent.name == "comparisons"


def test_of_a_folder_the_newest_like_the_other_run(tmp_path: Path) -> None:
    expected = a_file(tmp_path, 1)
    a_file(tmp_path, 2, gpu="NVIDIA L4")
    a_file(tmp_path, 3, device="cpu")
    a_file(tmp_path, 4, sweep="quick")
    a_file(tmp_path, 5, gpu=None, device="meta")
    assert found(tmp_path, tmp_path, like=CUDA) == expected
    assert found(tmp_path, tmp_path).name.startswith("20261105")
    assert found(tmp_path, tmp_path, like=Like(None, "meta", "default")).name.startswith("20261105")
    assert found(tmp_path, tmp_path, like=Like(GPU, "cuda", "quick")).name.startswith("20261104")
    assert found(tmp_path, tmp_path, like=Like(GPU, "cpu", "default")).name.startswith("20261103")


def test_what_is_compared_across_need_not_be_the_same(tmp_path: Path) -> None:
    a_file(tmp_path, 1)
    a_file(tmp_path, 2, gpu="NVIDIA L4")
    a_file(tmp_path, 3, device="cpu")
    a_file(tmp_path, 4, gpu="NVIDIA L4", sweep="quick")
    across = {("gpu",): "02", ("device",): "03", ("torch",): "01", ("gpu", "device"): "03"}
    for keys, day in across.items():
        assert found(tmp_path, tmp_path, like=Like(GPU, "cuda", "default", across=keys)).name.startswith(f"202611{day}")


def test_the_head_is_not_its_own_base(tmp_path: Path) -> None:
    expected, head = a_file(tmp_path / "gpu", 1), a_file(tmp_path / "gpu", 2)
    other = tmp_path / "gpu" / ".." / "gpu" / head.name
    for path in (head, other):
        like = Like.run(read_one(path))
        for name in (str(tmp_path), str(tmp_path / "gpu"), "latest", "1a2b"):
            assert found(name, tmp_path, like=like) == expected


def test_a_run_says_what_another_must_have_in_common_with_it(tmp_path: Path) -> None:
    path = a_file(tmp_path, 1, sweep="quick")
    assert Like.run(read_one(path), ("torch",)) == Like(GPU, "cuda", "quick", path, ("torch",), "1a2b3c4", False)


@pytest.mark.parametrize(("dirty", "commit"), [(True, None), (False, "1a2b3c4"), (None, "1a2b3c4")])
def test_only_a_clean_run_has_a_commit_that_another_is_not_of(
    dirty: bool | None, commit: str | None, tmp_path: Path
) -> None:
    assert Like.run(read_one(a_file(tmp_path, 1, dirty=dirty))).commit == commit


@pytest.mark.parametrize(("deselected", "narrowed"), [(["b4"], True), ([], False), (None, False)])
def test_a_run_with_deselected_cases_is_narrowed(deselected: Any, narrowed: bool, tmp_path: Path) -> None:
    assert Like.run(read_one(a_file(tmp_path, 1, deselected=deselected))).narrowed is narrowed


def test_broken_and_foreign_files_of_a_folder_are_passed_over(tmp_path: Path) -> None:
    expected = a_file(tmp_path, 1)
    for name, content in {
        "a": "{",
        "b": "[]",
        "c": json.dumps(FOREIGN),
        "d": '{"vram": {"schema": 9}}',
        "e": "",
    }.items():
        (tmp_path / f"20261109{name}.json").write_text(content, encoding="utf-8")
    (tmp_path / "20261109f.json").write_bytes(b"\xff")
    (tmp_path / "20261109g.json").mkdir()
    (tmp_path / "20261109h.json").symlink_to("20261109h.json")
    (tmp_path / "20261109i.json").symlink_to("nowhere.json")
    put(tmp_path / "20261109j.json", records={})
    foreign(tmp_path / "20261109k.json", {"kind": "pytest-vram comparison"})
    for name in (str(tmp_path), "latest", "1a2b3c4"):
        assert found(name, tmp_path) == expected


def test_a_run_with_a_refused_record_is_a_run(tmp_path: Path) -> None:
    a_file(tmp_path, 1)
    path = put(tmp_path / "20261102T000000Z_a_0000.json", facts(), facts(id="b4", time={}))
    assert found(tmp_path, tmp_path) == path


@pytest.mark.parametrize(
    ("like", "words"),
    [
        (None, []),
        (CUDA, [GPU, "default"]),
        (Like(None, "meta", "quick"), ["estimates", "quick"]),
        (Like(None, "cpu", "quick"), ["cpu", "quick"]),
    ],
)
def test_a_folder_with_no_such_run_is_one_line(like: Like | None, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    line = refusal(str(tmp_path / "empty"), tmp_path, like=like)
    assert all(word in line for word in ("empty", "no finished run", *words))


def test_the_newest_run_is_the_newest_whatever_its_file_is_called(tmp_path: Path) -> None:
    for name, day in (("main.json", 1), ("20261120T000000Z_a_0000.json", 20)):
        put(tmp_path / name, facts(), environment={"gpu": GPU, "started": f"2026-11-{day:02}T00:00:00+00:00"})
    assert found(tmp_path, tmp_path).name == "20261120T000000Z_a_0000.json"


# The latest


def test_the_latest_is_the_newest_finished_like_the_other(tmp_path: Path) -> None:
    a_file(tmp_path / "h100", 1)
    expected = a_file(tmp_path / "h100", 3)
    a_file(tmp_path / "h100", 4, complete=False)
    a_file(tmp_path / "h100", 5, sweep="quick")
    a_file(tmp_path / "l4", 6, gpu="NVIDIA L4")
    a_file(tmp_path / "estimated", 7, gpu=None, device="meta")
    assert found("latest", tmp_path, like=CUDA) == expected
    assert found("latest", tmp_path, like=Like.run(read_one(expected))).name.startswith("20261101")
    assert found("latest", tmp_path).name.startswith("20261107")


OTHER = {"commit": "fedcba9"}


@pytest.mark.parametrize(
    ("newer", "head", "is_it"),
    [
        (OTHER, {}, True),
        ({}, {}, False),
        ({}, {"dirty": True}, True),
        ({}, {"commit": None}, True),
        ({"commit": None}, {}, True),
        ({**OTHER, "dirty": True}, {}, False),
        ({**OTHER, "dirty": True}, {"dirty": True}, False),
        ({**OTHER, "dirty": None}, {}, True),
        ({**OTHER, "deselected": ["b4"]}, {}, False),
        ({**OTHER, "deselected": ["b4"]}, {"deselected": ["b8"]}, True),
        ({**OTHER, "deselected": []}, {}, True),
        ({"deselected": ["b4"]}, {"deselected": ["b4"]}, False),
    ],
)
def test_the_latest_is_rather_of_another_commit_and_clean_and_whole(
    newer: dict[str, Any], head: dict[str, Any], is_it: bool, tmp_path: Path
) -> None:
    old, new = a_file(tmp_path, 1, commit="0123abc"), a_file(tmp_path, 2, **newer)
    like = Like.run(read_one(a_file(tmp_path, 3, **head)))
    assert found("latest", tmp_path, like=like) == (new if is_it else old)
    assert found(tmp_path, tmp_path, like=like) == new, "who names a folder means its newest"
    old.unlink()
    assert found("latest", tmp_path, like=like) == new, "where there is no better one"


def test_where_each_run_lacks_something_the_latest_is_the_newest_of_all(tmp_path: Path) -> None:
    a_file(tmp_path, 1)
    a_file(tmp_path, 2, **OTHER, dirty=True)
    expected = a_file(tmp_path, 3, **OTHER, deselected=["b4"])
    like = Like.run(read_one(a_file(tmp_path, 4)))
    assert found("latest", tmp_path, like=like) == expected
    other = a_file(tmp_path, 5, gpu="NVIDIA L4", **OTHER)
    assert found("latest", tmp_path, like=like) == expected
    assert found("latest", tmp_path) == other


def test_of_those_that_are_rather_meant_the_newest(tmp_path: Path) -> None:
    a_file(tmp_path, 1, **OTHER)
    expected = a_file(tmp_path, 2, **OTHER)
    head = a_file(tmp_path, 3)
    a_file(tmp_path, 4)
    assert found("latest", tmp_path, like=Like.run(read_one(head))) == expected


def test_a_head_that_nobody_compares_with_is_the_newest_whatever_its_state(tmp_path: Path) -> None:
    a_file(tmp_path, 1)
    expected = a_file(tmp_path, 2, dirty=True, deselected=["b4"])
    assert found("latest", tmp_path) == expected


def test_there_is_no_latest(tmp_path: Path) -> None:
    for results in (tmp_path, tmp_path / "gone"):
        line = refusal("latest", results, like=CUDA)
        assert line.startswith("latest: ")
        assert str(results) in line
    head = a_file(tmp_path, 1)
    assert "no finished run" in refusal("latest", tmp_path, like=Like.run(read_one(head)))


# A commit


def test_a_commit_by_any_name_that_git_knows(repository: Path, tmp_path: Path) -> None:
    commits = [git(repository, "rev-parse", f"HEAD~{back}") for back in range(3)]
    paths = [a_file(tmp_path / "h100", 3 - back, commit=commit[:7]) for back, commit in enumerate(commits)]
    names: dict[str, int] = {"HEAD": 0, "main": 0, "HEAD~1": 1, "HEAD^": 1, "main~2": 2, "v1": 2, "v1.0": 2, "@": 0}
    names |= {commit: back for back, commit in enumerate(commits)}
    names |= {commit[:10].upper(): back for back, commit in enumerate(commits)}
    names |= {commit[:5]: back for back, commit in enumerate(commits)}
    for name, back in names.items():
        assert found(name, tmp_path, repository) == paths[back], name
        assert found(name, tmp_path, repository, CUDA) == paths[back], name


def test_a_commit_is_known_where_the_run_has_all_of_its_id(repository: Path, tmp_path: Path) -> None:
    path = a_file(tmp_path, 1, commit=git(repository, "rev-parse", "HEAD"))
    a_file(tmp_path, 2, commit=git(repository, "rev-parse", "HEAD~1"))
    assert found("HEAD", tmp_path, repository) == path


def test_of_a_commit_the_newest_finished_run_like_the_other(repository: Path, tmp_path: Path) -> None:
    commit = git(repository, "rev-parse", "--short=7", "HEAD")
    a_file(tmp_path, 1, commit=commit)
    expected = a_file(tmp_path, 2, commit=commit)
    a_file(tmp_path, 3, commit=commit, complete=False)
    a_file(tmp_path, 4, commit=commit, sweep="quick")
    a_file(tmp_path, 5)
    assert found("HEAD", tmp_path, repository, CUDA) == expected


def test_where_git_does_not_know_a_commit_its_id_or_a_prefix_of_it_will_do(tmp_path: Path) -> None:
    path = a_file(tmp_path, 1, commit="1a2b3c4")
    a_file(tmp_path, 2, commit="fedcba9")
    for name in ("1a2b", "1a2b3c4", "1A2B3C4", "1a2b3c4" + "0" * 33):
        assert found(name, tmp_path, tmp_path / "gone") == path
    for name in ("1a2b3c5", "a2b3", "1a2b3c40" * 6, "1a2"):
        assert name[:12] in refusal(name, tmp_path, tmp_path / "gone")


def test_an_id_of_four_digits_is_the_shortest(tmp_path: Path) -> None:
    path = a_file(tmp_path, 1, commit="1a2b")
    assert found("1a2b3c4", tmp_path) == found("1a2b", tmp_path) == path


def test_without_git_an_id_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = a_file(tmp_path, 1)
    monkeypatch.setenv("PATH", "")
    assert found("1a2b3c4", tmp_path) == path
    assert "HEAD" in refusal("HEAD", tmp_path)


@pytest.mark.parametrize(("dirty", "is_it"), [(True, False), (False, True), (None, True)])
def test_a_dirty_run_is_not_the_commit(dirty: bool | None, is_it: bool, tmp_path: Path) -> None:
    old = a_file(tmp_path, 1)
    new = a_file(tmp_path, 2, dirty=dirty)
    assert found("1a2b3c4", tmp_path) == (new if is_it else old)
    assert found("latest", tmp_path) == new


@pytest.mark.parametrize("commit", [None, 3, ["1a2b3c4"], "", "1", "1a2", "nogit", {"a": 1}, True])
def test_a_run_whose_commit_is_none_is_of_no_commit(commit: Any, tmp_path: Path) -> None:
    a_file(tmp_path, 1, commit=commit)
    assert "1a2b3c4" in refusal("1a2b3c4", tmp_path)


def test_a_commit_that_was_not_measured_is_named(repository: Path, tmp_path: Path) -> None:
    a_file(tmp_path, 1)
    line = refusal("HEAD~1", tmp_path, repository, CUDA)
    assert all(part in line for part in ("HEAD~1", git(repository, "rev-parse", "HEAD~1")[:12], str(tmp_path), GPU))


# Names that mean harm

ODD = ["nothing", "HEAD~99", "main:", ":/commit", "HEAD..main", "a\0b", "HEAD^{tree}", "$(id)", "..x", "*", "-"]


@pytest.mark.parametrize("name", ODD)
def test_a_name_that_is_nothing_is_one_line(name: str, repository: Path, tmp_path: Path) -> None:
    a_file(tmp_path, 1)
    said = name.replace("\0", " ")  # a message is text
    assert refusal(name, tmp_path, repository).startswith(f"{said}: ")


@pytest.mark.parametrize(
    "name", ["--all", "-h", "--git-dir", "--local-env-vars", "--show-toplevel", "--parseopt", "--"]
)
def test_a_name_does_not_become_an_option_of_git(name: str, repository: Path, tmp_path: Path) -> None:
    a_file(tmp_path, 1, commit=git(repository, "rev-parse", "--short=7", "HEAD"))
    said = name.replace("\0", " ")  # a message is text
    assert refusal(name, tmp_path, repository).startswith(f"{said}: ")


def test_a_tag_that_looks_like_an_option_is_a_tag(repository: Path, tmp_path: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD~1")
    git(repository, "update-ref", "refs/tags/--help", commit)
    path = a_file(tmp_path, 1, commit=commit[:7])
    assert found("--help", tmp_path, repository) == path


@pytest.mark.parametrize("name", ["x" * 300, "x" * 5000, "a/" * 3000], ids=["a long name", "a longer one", "a path"])
def test_a_name_that_no_file_can_have_is_one_line(name: str, tmp_path: Path) -> None:
    assert refusal(name, tmp_path)


def test_no_name_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_file(tmp_path, 1)
    monkeypatch.chdir(tmp_path)
    assert refusal("", tmp_path / "results")


def test_a_name_of_several_lines_is_told_in_one(tmp_path: Path) -> None:
    assert refusal("a\nb", tmp_path)
