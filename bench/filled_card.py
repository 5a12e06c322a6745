"""Checks required memory the hard way: another process fills the card until only that much is left, give or take.

python bench/filled_card.py RUN.json CASE_ID… --output results/GPU/checks/NAME.json

Each case must complete with required + 64 MiB free, and run out of memory with required - 64 MiB. Needs a GPU.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "plugin"))

MIB = 1 << 20
MARGIN = 64 * MIB
FILLER = """
import sys, torch
held = torch.empty(0, dtype=torch.uint8, device="cuda")
for line in sys.stdin:
    del held
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(max(0, free - int(line)), dtype=torch.uint8, device="cuda")
    print(torch.cuda.mem_get_info()[0], flush=True)
"""


class Filler:
    """Another process that leaves so much of the GPU free."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", FILLER]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def leave(self, free: int) -> int:
        """Bytes that are really free then: the driver hands out 2 MiB at a time."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{free}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def stop(self) -> None:
        self._process.kill()
        self._process.communicate()


def check(run_path: Path, ids: list[str]) -> dict[str, Any]:
    """Each case with 64 MiB more and with 64 MiB less than its required memory free."""
    from pytest_vram.cases.case import Case
    from pytest_vram.cases.models import read_models
    from pytest_vram.measure import environment
    from pytest_vram.measure.job import job_of
    from pytest_vram.measure.machine import start_machine
    from pytest_vram.measure.measurement import CaseWorkers, Settings
    from pytest_vram.records.files import read_run

    models = read_models()
    records = {record.id: record for record in read_run(run_path).records}
    chosen = [records[name] for name in ids]
    machine = start_machine("cuda", models.values(), allow_shared=False, name_host=False, say=print)
    filler = Filler()
    facts = dict(machine.facts)
    found = []
    try:
        assert machine.gpu
        for record in chosen:
            required = record.memory.required_bytes
            assert required, f"{record.id} has no required memory"
            assert isinstance(record.case, Case)
            workers = CaseWorkers(
                record.case, job_of(record.case, models[record.case.model]), machine, Settings(), print
            )
            for margin in (MARGIN, -MARGIN):
                free = filler.leave(required + margin)
                machine.facts["gpu_idle_bytes"] = machine.gpu.used_bytes()
                began = time.monotonic()
                probe = workers.probe(None)
                found.append(
                    {
                        "id": record.id,
                        "required_bytes": required,
                        "free_bytes": free,
                        "fits": probe.fits,
                        "expected": margin > 0,
                        "failed_in": probe.failed_in,
                        "seconds": time.monotonic() - began,
                    }
                )
                print(
                    f"{record.id}: required {required >> 20} MiB, {free >> 20} free: "
                    f"{'completed' if probe.fits else 'out of memory'}"
                    f"{'' if probe.fits == (margin > 0) else ', AGAINST EXPECTATION'}"
                )
    finally:
        filler.stop()
        machine.close()
    described = {**environment.describe(ROOT, start=machine.starter.name, name_host=False), **facts}
    return {
        "check": "filled card",
        "run": run_path.name,
        "margin_bytes": MARGIN,
        "environment": described,
        "found": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("ids", nargs="+", metavar="CASE_ID")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    result = check(arguments.run, arguments.ids)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if any(entry["fits"] != entry["expected"] for entry in result["found"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
