"""What a run was made with: versions, commit and machine, with names and folders kept out."""

import os
import platform
import subprocess
import sys
import tempfile
from datetime import datetime, timedelta
from importlib import metadata
from pathlib import Path

import pytest

import pytest_vram
from pytest_vram.measure.environment import cpu_name, describe, git_state, hidden, versions, without_paths


def git(folder: Path, *args: str) -> str:
    identity = ["-c", "user.name=Test", "-c", "user.email=test@localhost"]
    command = ["git", "-C", str(folder), *identity, *args]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    (tmp_path / "tracked").write_text("one")
    git(tmp_path, "add", "tracked")
    git(tmp_path, "commit", "-qm", "one")
    return tmp_path


def test_versions_of_what_is_installed_and_none_for_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name in ("accelerate", "pytest-vram"):
            raise metadata.PackageNotFoundError(name)
        return f"{name} 1.0"

    monkeypatch.setattr(metadata, "version", version)
    assert versions() == {
        "torch": "torch 1.0",
        "diffusers": "diffusers 1.0",
        "transformers": "transformers 1.0",
        "accelerate": None,
        "pytest-vram": pytest_vram.__version__,  # a checkout knows its own version
    }


def test_a_clean_commit(repository: Path) -> None:
    commit = git(repository, "rev-parse", "HEAD")
    (repository / "untracked").write_text("results of the last run")
    (repository / "sub").mkdir()
    assert git_state(repository) == (commit[:7], False)
    assert git_state(repository / "sub") == (commit[:7], False)


@pytest.mark.parametrize("staged", [False, True])
def test_a_change_to_a_tracked_file_is_dirty(repository: Path, staged: bool) -> None:
    (repository / "tracked").write_text("two")
    if staged:
        git(repository, "add", "tracked")
    assert git_state(repository)[1] is True


@pytest.mark.parametrize("missing", ["repository", "commit", "folder", "git"])
def test_no_commit_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    if missing == "commit":
        git(tmp_path, "init", "-q")
    if missing == "git":
        monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path / "no" if missing == "folder" else tmp_path) == (None, None)


def test_a_hash_stands_for_a_name_and_is_the_same_every_time() -> None:
    assert hidden("alice-laptop", True) == "alice-laptop"
    assert hidden("alice-laptop", False) == hidden("alice-laptop", False) != hidden("bob-laptop", False)
    assert "alice" not in hidden("alice-laptop", False)


def test_an_environment_tells_the_machine_and_hides_the_host(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "alice-laptop")
    found = describe(repository, start="fork", name_host=False)
    assert "alice-laptop" not in str(found)
    assert found["host"] == hidden("alice-laptop", False)
    assert (found["commit"], found["dirty"], found["start"]) == (*git_state(repository), "fork")
    assert (found["python"], found["cpus"]) == (platform.python_version(), os.cpu_count())
    assert found.keys() >= versions().keys()
    assert datetime.fromisoformat(found["started"]).utcoffset() == timedelta(0)
    assert describe(repository, start="fork", name_host=True)["host"] == "alice-laptop"


def test_the_processor_has_a_name() -> None:
    name = cpu_name()
    assert name
    assert name == name.strip()


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose Python lies in the home folder."""
    monkeypatch.setenv("HOME", "/home/al")
    monkeypatch.setattr(tempfile, "tempdir", "/var/tmp/x")
    monkeypatch.setattr(sys, "prefix", "/home/al/venv")
    monkeypatch.setattr(sys, "base_prefix", "/opt/python")
    monkeypatch.setattr(sys, "path", ["", "/srv/wheels", "/home/al/venv/lib/site-packages"])


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("no file /home/al/models/a.toml", "no file ~/models/a.toml"),
        ("/var/tmp/x/b and /home/al", "<tmp>/b and ~"),
        ('File "/home/al/venv/lib/torch/x.py", line 1', 'File "<python>/lib/torch/x.py", line 1'),
        ("/opt/python/lib/python3.11/json", "<python>/lib/python3.11/json"),
        ("/srv/models stays", "/srv/models stays"),
        ("/srv/wheels/bitsandbytes/x.so", "<path>/bitsandbytes/x.so"),
        ("/home/al/venv/lib/site-packages/torch", "<python>/lib/site-packages/torch"),
    ],
)
def test_folders_are_cut_from_a_text(text: str, cut: str) -> None:
    assert without_paths(text) == cut


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize("text", ["/home/alice/a", "/opt/python3/b", "/mnt/home/al/c"])
def test_a_folder_that_only_looks_alike_is_left_whole(text: str) -> None:
    assert without_paths(text) == text
