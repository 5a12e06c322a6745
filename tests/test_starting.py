"""What `pytest-vram init` writes into a repository, and that it overwrites nothing."""

import ast
import shutil
import sys
from pathlib import Path

import pytest

from pytest_vram.cli import main
from pytest_vram.errors import UsageError
from pytest_vram.records.files import read_run
from pytest_vram.starting import initialize
from tests.test_example import EXAMPLE
from tests.test_own import run_file, run_pytest

ALL = ["bench/matrix.toml", "bench/test_generation.py", "bench/test_pipeline.py", "conftest.py"]
ADDOPTION = "def pytest_addoption(parser):\n    parser.addoption({!r}, action='store_true')\n"


def files(root: Path) -> dict[str, str]:
    """All files of a repository, by name."""
    return {path.relative_to(root).as_posix(): path.read_text() for path in sorted(root.rglob("*")) if path.is_file()}


def done(root: Path, build: str | None = "app:build", call: str | None = "app:call") -> dict[str, str]:
    """What init says of each file."""
    return {written.path: written.done for written in initialize(root, build, call)}


def test_an_empty_folder_gets_everything_and_a_second_time_nothing(tmp_path: Path) -> None:
    assert done(tmp_path) == dict.fromkeys(ALL, "written")
    first = files(tmp_path)
    assert list(first) == ALL
    again = list(initialize(tmp_path, "app:build", "app:call"))
    assert {written.done for written in again} == {"is there, left as it is", "has --gpu"}
    assert not any(written.left for written in again)
    assert files(tmp_path) == first


def test_without_a_pipeline_of_ones_own_there_is_the_sweep_alone(tmp_path: Path) -> None:
    assert sorted(done(tmp_path, None, None)) == [name for name in ALL if name != "bench/test_pipeline.py"]
    assert not (tmp_path / "bench" / "test_pipeline.py").exists()


def test_what_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    theirs = {name: f"# theirs: {name}\n" for name in ALL[:3]}
    for name, text in theirs.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "conftest.py").write_text(ADDOPTION.format("--slow"))
    written = {file.path: file for file in initialize(tmp_path, "app:build", "app:call")}
    assert files(tmp_path) == {**theirs, "conftest.py": ADDOPTION.format("--slow")}
    assert {written[name].done for name in theirs} == {"is there, left as it is"}
    assert written["conftest.py"].done == "left as it is"
    assert 'parser.addoption("--gpu", ' in written["conftest.py"].left


def test_a_conftest_with_a_gpu_option_of_its_own_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(ADDOPTION.format("--gpu"))
    assert done(tmp_path)["conftest.py"] == "has --gpu"
    assert (tmp_path / "conftest.py").read_text() == ADDOPTION.format("--gpu")


def test_a_conftest_without_options_keeps_what_it_has(tmp_path: Path) -> None:
    theirs = "import os\n\nNAME = os.name\n"
    (tmp_path / "conftest.py").write_text(theirs)
    assert done(tmp_path)["conftest.py"] == "--gpu added"
    text = (tmp_path / "conftest.py").read_text()
    assert text.startswith(theirs)
    assert text.count("def pytest_addoption(parser):") == 1


BAD = [
    (["--build", "app:build"], "--build and --call go together: "),
    (["--call", "app:call"], "--build and --call go together: "),
    (["--build", "app.build", "--call", "app:call"], "--build: 'app.build' is not module:function, such as "),
    (["--build", "app:build", "--call", "app.py:Painter.call"], "--call: 'app.py:Painter.call' is not module:function"),
    (["--build", "app:build()", "--call", "app:call"], "--build: 'app:build()' is not module:function"),
    (["--build", "../app:build", "--call", "app:call"], "--build: '../app:build' is not module:function"),
    (["--build", "app:a\nb", "--call", "app:call"], "--build: 'app:a\\nb' is not module:function"),
]


def init(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """The command as it is typed, in a folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["pytest-vram", "init", *options])
    main()


@pytest.mark.parametrize(("options", "problem"), BAD, ids=[" ".join(options) for options, _ in BAD])
def test_a_bad_reference_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    problem: str,
) -> None:
    with pytest.raises(SystemExit) as caught:
        init(tmp_path, monkeypatch, *options)
    assert caught.value.code == 2
    output = capsys.readouterr()
    (line,) = output.err.splitlines()
    assert line.startswith(f"pytest-vram: {problem}")
    assert not files(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "bench").touch()
    with pytest.raises(UsageError, match=r"^init: .*/bench cannot be written: "):
        done(tmp_path)


def test_two_functions_of_the_same_name_are_both_imported(tmp_path: Path) -> None:
    done(tmp_path, "models:make", "requests:make")
    tree = ast.parse((tmp_path / "bench" / "test_pipeline.py").read_text())
    imports = [alias for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert len({alias.asname or alias.name for alias in imports}) == 2


def test_a_conftest_that_is_not_utf_8_keeps_its_bytes(tmp_path: Path) -> None:
    old = "# -*- coding: latin-1 -*-\r\n# café\r\n".encode("latin-1")
    (tmp_path / "conftest.py").write_bytes(old)
    done(tmp_path)
    new = (tmp_path / "conftest.py").read_bytes()
    assert new.startswith(old)
    assert b'"--gpu"' in new
    assert new.count(b"\n") == new.count(b"\r\n")


def test_init_and_one_pytest_command_measure_a_pipeline_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(EXAMPLE / "app.py", tmp_path)
    init_options = ["--build", "app:build_painter", "--call", "app:paint_two"]
    with pytest.raises(SystemExit) as caught:
        init(tmp_path, monkeypatch, *init_options)
    assert not caught.value.code
    said = capsys.readouterr().out
    assert all(name in said for name in ALL)
    result = run_pytest(tmp_path, "bench/test_pipeline.py", "--vram-device=cpu", "--vram-rounds=1")
    assert result.returncode == pytest.ExitCode.OK, result.stdout
    (record,) = read_run(run_file(tmp_path)).records
    assert (record.id, record.status) == ("bench/test_pipeline.py::test_pipeline", "ok")
