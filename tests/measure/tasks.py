"""What the workers of these tests do; `module:function` names a task, the job says the rest. Imports no torch."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pytest_vram.measure.channel import Message
from pytest_vram.measure.worker import Reporter

MIB = 1 << 20
ROUND = {"encode": 0.1, "denoise": 0.6, "decode": 0.3}
STEPS = {"first": 0.3, "later": 0.15}
SECOND_CALL = {"encode": 0.2, "denoise": 0.8, "decode": 0.4}  # of a probe
SECOND_STEPS = {"first": 0.5, "later": 0.25}
DIFFERENCE = {"max_abs_difference": 0.5, "mean_abs_difference": 0.001, "psnr_db": 40.0}


def facts(job: Message, reporter: Reporter) -> None:
    """Tell what kind of process this is, then go on until the next message."""
    score = Path("/proc/self/oom_score_adj")
    reporter.ask(
        "facts",
        pid=os.getpid(),
        parent=os.getppid(),
        session=os.getsid(0),
        argument=job.get("argument"),
        environ={name: os.environ.get(name) for name in job.get("environ", ())},
        modules=[name for name in job.get("modules", ()) if name in sys.modules],
        oom_score_adj=int(score.read_text()) if score.exists() else None,
    )


def echo(job: Message, reporter: Reporter) -> None:
    """Give every message back."""
    while True:
        job = reporter.ask("echo", message=job)


def end(job: Message, reporter: Reporter) -> None:
    """End as the job says, after writing to both outputs."""
    print("to stdout", "x" * job.get("filler", 0), flush=True)
    print("to stderr", file=sys.stderr)
    if "signal" in job:
        os.kill(os.getpid(), job["signal"])
    if "exit" in job:
        sys.exit(job["exit"])
    if "raise" in job:
        raise ValueError(job["raise"])


def quiet(job: Message, reporter: Reporter) -> None:
    """Write one line to stdout, and leave the flushing to the interpreter."""
    sys.stdout.write("the worker's own")


def nest(job: Message, reporter: Reporter) -> None:
    """Start another process, and sleep."""
    process = subprocess.Popen(["sleep", "60"])
    reporter.send("asleep", parent=os.getppid(), child=process.pid)
    time.sleep(60)


def sleep(job: Message, reporter: Reporter) -> None:
    """Sleep in the load phase."""
    reporter.send("phase", phase="load", parent=os.getppid())
    time.sleep(60)


def freeze(job: Message, reporter: Reporter) -> None:
    """Be stopped in the load phase, and not go on."""
    reporter.send("phase", phase="load", parent=os.getppid())
    os.kill(os.getpid(), signal.SIGSTOP)


def die(job: Message, reporter: Reporter) -> None:
    """Be killed while loading, as by the kernel, or by the `signal` of the script."""
    reporter.send("phase", phase="load")
    if script_of(job).get("kill_server"):
        kill_server()
    print("what it said last is not why", flush=True)
    os.kill(os.getpid(), script_of(job).get("signal", signal.SIGKILL))


def script_of(job: Message) -> dict[str, Any]:
    """What a test wants of its worker: JSON in the model's `pipeline_arguments`, which travel with every job."""
    script: dict[str, Any] = json.loads(job["model"]["pipeline_arguments"]["script"])
    return script


def kill_server() -> None:
    """Have the server that this worker comes from killed, and wait until it is gone."""
    server = os.getppid()
    os.kill(server, signal.SIGKILL)
    while os.getppid() == server:
        time.sleep(0.01)


def blow(job: Message, reporter: Reporter) -> None:
    """Raise what `raises` in the script says, after loading."""
    reporter.send("phase", phase="load")
    reporter.send("phase", phase="warm-up")
    raise ValueError(script_of(job)["raises"])


def generate(job: Message, reporter: Reporter) -> None:
    """The messages of generation.py with no pipeline; the script says what differs.

    `failed` holds the fields of a failure, `done` those that replace the figures below. A probe completes under a cap
    from `need_mib` on, and `fits` holds what differs then; `below` is what becomes of it otherwise: `die`, `hang`, or
    the fields of its failure. `with_room` has those of a probe with no cap. `skipped` is why the case cannot be run,
    `no_reference` has the fields of the failure of a reference. An output is the names of the optimizations. `round_s`
    is what a round really takes; throttled ones are repeated, up to `repeated` of them. `need_mib` may have a figure
    for each GPU. Of several processes the one of rank `lost` raises or, with `dies`, dies, and the others wait for it;
    `slow` is one that does not finish.
    """
    script = script_of(job)
    rank = os.environ.get("RANK")
    figures: dict[str, Any] = {
        "load_s": 0.5,
        "cold_s": 2.0,
        "warmup_s": 3.0,
        "rounds_wall_s": 3.0,
        "rounds": [ROUND] * 3,
        "effects": dict.fromkeys(job["case"]["optimizations"] if "case" in job else (), "applied"),
        "steps": [STEPS] * 3,
        "denoiser_calls": 3,
        "native_denoiser_calls": 30,
        "native_steps": 25,
        "images": 2,
        "phase_peaks": {},
        "weights_bytes": 300 * MIB,
        "host_peak_bytes": 1000 * MIB,
    }
    cap = None
    if job["device"] == "cuda":
        answer = reporter.ask("context", reserved_bytes=0)
        cap = answer["cap_bytes"]
        if isinstance(script.get("need_mib"), list):
            script["need_mib"] = script["need_mib"][answer["gpus"][0]]
        reporter.send("phase", phase=f"cap {cap}")
        reserved = 600 * MIB if cap is None else min(600 * MIB, cap)
        figures |= {
            "phase_peaks": {"load": 300 * MIB, "denoise": 500 * MIB},
            "allocated_peak_bytes": min(500 * MIB, reserved),
            "reserved_peak_bytes": reserved,
            "reserved_bytes": reserved,
            "alloc_retries": 0,
        }
    reporter.send("phase", phase="load")
    if rank and rank == script.get("slow"):
        time.sleep(60)
    if rank and "lost" in script:
        if rank != script["lost"]:
            time.sleep(60)
        if script.get("dies"):
            os.kill(os.getpid(), signal.SIGKILL)
        reporter.ask("failed", status="oom", phase="denoise", message="OutOfMemoryError: on the other GPU")
    if job.get("probe"):
        _probe(script, cap, figures, reporter)
        return
    if job.get("reference"):
        _reference(script, job, reporter)
        return
    if script.get("kill_server"):
        kill_server()
    if job.get("leak_calls"):
        _calls_again(script, job, figures, reporter)
        return
    figures |= script.get("done", {})
    reporter.send("phase", phase="warm-up")
    if "skipped" in script:
        reporter.ask("skipped", status="skipped", message=script["skipped"])
        return
    if "failed" in script:
        reporter.ask("failed", **{**figures, **script["failed"]})
        return
    reporter.send("rounds", count=len(figures["rounds"]), pilot_s=1.0, found={"weights_bytes": 300 * MIB})
    if script.get("hangs"):
        time.sleep(60)
    asked = batch = len(figures["rounds"])
    done = 0
    while batch > 0:
        for index in range(done, done + batch):
            time.sleep(script.get("round_s", 0))
            reporter.send("round", index=index)
        done += batch
        lost = len(reporter.ask("rounds_over")["throttled"])
        batch = min(asked + lost, asked + script.get("repeated", 0)) - done
    figures["rounds"] = [*figures["rounds"], *[ROUND] * (done - asked)]
    figures["steps"] = [*figures["steps"], *[STEPS] * (done - asked)]
    if job.get("keep_output"):
        _keep_output(job)
    if job.get("compare_output"):
        assert Path(job["compare_output"]).exists()
        figures |= script.get("compared", {"difference": DIFFERENCE})
    reporter.ask("done", **figures)


def _probe(script: dict[str, Any], cap: int | None, figures: dict[str, Any], reporter: Reporter) -> None:
    if cap is None and "with_room" in script:
        reporter.ask("failed", **{**figures, **script["with_room"]})
        return
    if cap is None or cap >= script.get("need_mib", 550) * MIB:
        calls = {"second_call": SECOND_CALL, "second_call_retries": 4, "denoiser_calls": 2}
        calls |= {"second_call_steps": SECOND_STEPS}
        reporter.ask("done", **{**figures, **calls, **script.get("fits", {})})
        return
    below = script.get("below", {})
    if below == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if below == "hang":
        time.sleep(60)
    failure = {"status": "oom", "swallowed": False, "phase": "denoise", "message": "OutOfMemoryError: CUDA"}
    reporter.ask("failed", **{**figures, **failure, **below})


def _calls_again(script: dict[str, Any], job: Message, figures: dict[str, Any], reporter: Reporter) -> None:
    """`grows` has bytes (or tensors) a call of what is counted; `tires` is `die`, `hang` or a failure."""
    tires = script.get("tires")
    if tires == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if tires == "hang":
        time.sleep(60)
    if tires:
        reporter.ask("failed", **{**figures, **tires})
    steps = range(job["leak_calls"] + 1)
    grows = {"host": 0, "tensors": 0, **({"allocated": 0, "reserved": 0} if job["device"] == "cuda" else {})}
    drift = {name: [1000 * MIB + n * each for n in steps] for name, each in (grows | script.get("grows", {})).items()}
    reporter.ask("done", **figures, drift=drift)


def _reference(script: dict[str, Any], job: Message, reporter: Reporter) -> None:
    if "no_reference" in script:
        reporter.ask("failed", **script["no_reference"])
        return
    _keep_output(job)
    reporter.ask("done")


def _keep_output(job: Message) -> None:
    Path(job["keep_output"]).write_text("+".join(job["case"]["optimizations"]))
