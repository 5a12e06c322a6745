"""What a run was made with: versions, commit, machine."""

import hashlib
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

# Settings from outside that change what is measured; those of PyTorch's allocator are not passed on to workers.
VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_MODULE_LOADING",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "TORCH_CUDNN_V8_API_DISABLED",
)
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "pytest-vram")


def versions() -> dict[str, str | None]:
    """Versions of the libraries that decide what a pipeline costs; None where one is not installed."""
    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    if found["pytest-vram"] is None:  # a checkout that is not installed
        from pytest_vram import __version__

        found["pytest-vram"] = __version__
    return found


def describe(root: Path, *, start: str, name_host: bool) -> dict[str, Any]:
    """The environment of a run on this machine, without its GPU; host and GPU are hashed unless `name_host`."""
    commit, dirty = git_state(root)
    return {
        "host": hidden(platform.node(), name_host),
        "os": f"{platform.system()} {re.split(r'[^0-9.]', platform.release())[0]}",  # without a build's own name
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        **versions(),
        "commit": commit,
        "dirty": dirty,
        **({"changes": changes(root)} if dirty else {}),
        "start": start,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def hidden(name: str, in_the_open: bool) -> str:
    """`name`, or a hash by which two runs of one machine are recognized."""
    return name if in_the_open else hashlib.sha256(name.encode()).hexdigest()[:12]


def git_state(root: Path) -> tuple[str | None, bool | None]:
    """(commit, whether tracked files differ from it), or None for both where there is no git."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        return git("rev-parse", "--short=7", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


def changes(root: Path) -> str | None:
    """A hash of what tracked files hold beyond the commit, by which two dirty checkouts are told apart."""
    try:
        command = ["git", "-C", str(root), "diff", "--binary", "HEAD"]
        found = subprocess.run(command, capture_output=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return hashlib.sha256(found).hexdigest()[:12]


def cpu_name() -> str:
    """The processor's name."""
    try:
        lines: Iterable[str] = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = ()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def without_paths(text: str) -> str:
    """`text` with the home, temporary, installation and working folders cut from it, and those of PYTHONPATH."""
    homes = {
        str(Path.home()): "~",
        tempfile.gettempdir(): "<tmp>",
        sys.prefix: "<python>",
        sys.base_prefix: "<python>",
        str(Path(__file__).parents[2]): "<pytest-vram>",
        str(Path.cwd()): ".",
    }
    for entry in filter(os.path.isabs, sys.path):
        if not any(Path(entry).is_relative_to(home) for home in homes):
            homes[entry] = "<path>"
    for folder in sorted(homes, key=len, reverse=True):
        if len(folder) > 1:
            text = re.sub(rf"(?<![\w.-]){re.escape(folder)}(?![\w-])", homes[folder].replace("\\", "/"), text)
    return text
