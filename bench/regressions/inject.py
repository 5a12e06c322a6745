"""Regressions put into an application on purpose, and what `pytest --vram-compare` says of each. Needs a GPU.

python bench/regressions/inject.py {memory,time,small,stored} --output results/GPU/regressions/NAME.json

A scratch repository gets this folder's application; its first commit is the base. `memory`: one commit has a
regression in each of five tests. `time`: calls that take 10 % longer, `small`: 5 % longer, then nothing, with the base
measured again from its own checkout. `stored`: 25 % longer against the stored base. The two plain tests must never be
found worse.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

MEMORY = {"HELD_MIB = 0": "HELD_MIB = 80", "UPCASTS = False": "UPCASTS = True", "LEAKED_MIB = 0": "LEAKED_MIB = 64"}
MEMORY |= {"TOO_LARGE = False": "TOO_LARGE = True"}


class Part(NamedTuple):
    """Which tests run, how many workers measure each of the base, and what each further commit changes."""

    tests: str
    workers: int
    again: bool
    changes: dict[str, dict[str, str]]


PARTS = {
    "memory": Part("not time", 1, False, {"memory of five tests": MEMORY}),
    "time": Part("time or plain", 3, True, {"+10 % time": {"DECODES = 20": "DECODES = 22"}}),
    "small": Part("time or plain", 3, True, {"+5 % time": {"DECODES = 20": "DECODES = 21"}, "nothing": {}}),
    "stored": Part("time or plain", 3, False, {"+25 % time": {"DECODES = 20": "DECODES = 25"}}),
}


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=bench", "-c", "user.email=bench@localhost"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def repository(folder: Path) -> Path:
    """A repository with the application, its base committed."""
    folder.mkdir()
    shutil.copy(HERE / "app.py", folder)
    shutil.copy(HERE / "app_tests.py", folder / "test_app.py")  # named so that `pytest bench` does not run them here
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    (folder / "conftest.py").write_text('pytest_plugins = ["pytest_vram.plugin"]\n', encoding="utf-8")
    (folder / ".gitignore").write_text("results/\n__pycache__/\n", encoding="utf-8")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "base")
    return folder


def pytest(folder: Path, *options: str) -> tuple[int, float, str]:
    """Exit code, seconds and output of a run."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "plugin"), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--vram-device=cuda"]
    command += ["--vram-no-need", "--vram-rounds=3", *options]
    began = time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)
    return done.returncode, time.monotonic() - began, done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        head = repository(Path(name, "head"))
        part = PARTS[arguments.part]
        options = ["-k", part.tests]
        code, seconds, output = pytest(head, f"--vram-workers={part.workers}", *options)
        print(f"base: exit {code}, {seconds:.0f} s", flush=True)
        if code:
            sys.exit(output)
        base_run = next(head.glob("results/*/*.json"))
        git(Path(name), "clone", "-q", str(head), str(Path(name, "base")))
        whole = (head / "app.py").read_text(encoding="utf-8")
        tests = (head / "test_app.py").read_text(encoding="utf-8")
        if arguments.part == "memory":
            (head / "test_app.py").write_text(tests.replace("def test_removed", "def removed"), encoding="utf-8")
        checkout = [f"--vram-base-checkout={Path(name, 'base')}"] if part.again else []
        for what, edits in part.changes.items():
            text = whole
            for old, new in edits.items():
                assert old in text
                text = text.replace(old, new)
            (head / "app.py").write_text(text, encoding="utf-8")
            git(head, "commit", "--allow-empty", "-qam", what)
            code, seconds, output = pytest(head, f"--vram-compare={base_run}", *checkout, *options)
            saved = max(head.glob("results/*/comparisons/*.json"), key=lambda path: path.stat().st_mtime)
            comparison = json.loads(saved.read_text(encoding="utf-8"))
            if any("could not be measured again" in note for note in comparison["notes"]):
                sys.exit(output)
            found[what] = {"exit_code": code, "seconds": seconds, "comparison": comparison}
            print(f"== {what}: exit {code}, {seconds:.0f} s\n{output.split('compared with the base')[-1]}", flush=True)
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
