"""Writes docs/original-report.md from the runs in results/: python bench/original_report.py

The question of the report that this project grew out of, answered: four models at 512x512 on an RTX 3060.
"""

from pathlib import Path

from pytest_vram.cases.models import read_models
from pytest_vram.records.reading import read_runs
from pytest_vram.report.cards import find_card, read_cards
from pytest_vram.report.choices import SAME_TIME, Choice, Workload, against, baseline
from pytest_vram.report.document import Cell, Document, Table
from pytest_vram.report.evidence import gather
from pytest_vram.report.render import table_lines
from pytest_vram.report.text import gib, seconds, signed
from pytest_vram.report.verdicts import WORDS, best, recommended

ROOT = Path(__file__).parents[1]
GPU = "NVIDIA H100 80GB HBM3"  # where this question was measured
PAGE = ROOT / "docs" / "original-report.md"
MODELS = ("stable-diffusion-v1-5", "sdxl", "sdxl-turbo")  # sd-food has the weights of Stable Diffusion 1.5
FLAGS = ("attention_slicing", "vae_slicing", "model_offload", "expandable_segments")

TEXT = """\
# The report this project grew out of, corrected

Made from the runs in `results/` by `python bench/original_report.py`; the runs are listed in
[results/HARDWARE.md](../results/HARDWARE.md#runs) under the same tags.

One machine with a GeForce RTX 3060 ({visible} GiB as PyTorch sees it), torch 2.6, diffusers 0.33: four models (sd-food,
stable-diffusion-v1-5, sdxl, sdxl-turbo) made images of 512x512 in fp16, with attention slicing, VAE slicing, CPU
offload and expandable segments. The report's answer to "what does it take?" was **"minimum 2.1 GB VRAM"**. Here is the
answer, measured on {gpus}. GiB and seconds; batch 1; the RTX 3060 leaves {usable} GiB beside a desktop.

{answers}

sd-food and stable-diffusion-v1-5 have the same weights. *to take*: the set to take on that card. *required*: on that
card. *least*: the set that requires least of all at this size; `~` was estimated. *s*: one call with the model's own
number of steps, on the GPU that was measured, not on an RTX 3060. *host*: with the weights on their way to the GPU.
*card to get*: the smallest that runs it at full speed at this size, the image as it is and all weights on the GPU.

## Why 2.1 GB was wrong

It was read after the run. What a program holds then is its weights: for Stable Diffusion 1.5 in fp16 {weights_gb} GB,
to the digit what the report printed. The same program, `{case}`, in GiB:

{why}

On a card with that little free none of the report's flags makes it run: with CPU offload it requires {offload} GiB.
Layer by layer (sequential offload, which the report did not try) it does run, in {sequential} GiB and {slow} times the
time.

## What the report's flags do, at 512x512

*required* on the GPU that was measured, *saved* GiB and *paid* seconds against fp16 alone. A call of these small models
is bound by the CPU and varies by up to {same_time} times from run to run, rarely by more: closer times mean nothing.

{flags}

- **Attention slicing** saves nothing here: it replaces the fused attention, which needs no slices. At 1024x1024 it
  makes Stable Diffusion 1.5 require {sliced} GiB instead of {fused} ({sliced_runs}).
- **VAE slicing** does nothing for a single image.
- **CPU offload** makes Stable Diffusion 1.5 require {offload_saves} GiB less, for {offload_slow} times the time and
  {host_more} GiB more of host memory.
- **Expandable segments** save what fragmentation takes: {segments_save} GiB of Stable Diffusion 1.5.
"""


def _measured(workload: Workload, document: Document) -> list[Choice]:
    return next((choices for choices in document.evidence.by_gpu(workload) if choices[0].gpu == GPU), [])


def page(results: Path) -> str:
    """The text of the page, from the runs in `results`."""
    runs, _ = read_runs([results])
    cards = read_cards()
    document = Document(gather(runs), cards, read_models(), ROOT / "docs")
    card = find_card("RTX 3060", cards)
    workloads = [w for name in MODELS for w in document.evidence.subjects[name] if w.label == "512x512, batch 1"]
    first = next(w for w in workloads if w.model == MODELS[0])
    by_set = {choice.name: choice for choice in _measured(first, document)}
    plain, sequential = by_set["fp16"], by_set["fp16+sequential_offload"]
    offload = by_set["fp16+model_offload"]
    memory = plain.record.memory
    larger = next(w for w in document.evidence.subjects[MODELS[0]] if w.label == "1024x1024, batch 1")
    at_1024 = {choice.name: choice for choice in _measured(larger, document)}
    fused, sliced = at_1024["fp16"], at_1024["fp16+attention_slicing"]
    return TEXT.format(
        visible=card.visible_gib,
        usable=gib(card.usable_bytes),
        gpus=", ".join(document.gpus),
        answers=table_lines(_answers(workloads, document)),
        weights=gib(memory.weights_bytes),
        weights_gb=f"{(memory.weights_bytes or 0) / 1e9:.1f}",
        case=plain.record.id,
        why=table_lines(_why(plain, document)),
        same_time=f"{SAME_TIME:g}",
        offload_saves=signed((against(offload, plain)[0] or 0) / 2**30).removeprefix("+"),
        offload_slow=f"{(offload.call_s or 0) / (plain.call_s or 1):.1f}",
        segments_save=signed((against(by_set["fp16+expandable_segments"], plain)[0] or 0) / 2**30).removeprefix("+"),
        offload=gib(offload.required_bytes),
        sequential=gib(sequential.required_bytes),
        slow=f"{(sequential.call_s or 0) / (plain.call_s or 1):.0f}",
        flags=table_lines(_flags(workloads, document)),
        fused=gib(fused.required_bytes),
        sliced=gib(sliced.required_bytes),
        sliced_runs=document.tag(fused, sliced),
        host_more=f"{((offload.host_bytes or 0) - (plain.host_bytes or 0)) / 2**30:.1f}",
    )


def _answers(workloads: list[Workload], document: Document) -> Table:
    card = find_card("RTX 3060", document.cards)
    rows = []
    for workload in workloads:
        verdict = best(workload, card, document.evidence)
        known = [*_measured(workload, document), *document.evidence.estimated(workload)]
        least = min(known, key=lambda choice: choice.required_bytes or 1 << 62)
        good = recommended(workload, document.cards, document.evidence)
        rows.append(
            [
                Cell(document.name(workload)),
                Cell(f"{WORDS[verdict.outcome]}:", name=verdict.choice.name),
                Cell(gib(verdict.required_bytes)),
                Cell(seconds(verdict.call_s)),
                Cell(gib(verdict.choice.host_bytes)),
                Cell(gib(verdict.choice.disk_bytes)),
                Cell(("~" if least.estimated else "") + gib(least.required_bytes), name=least.name),
                Cell(f"{good.card.memory_gib:g} GB: {good.card.name}" if good else "none"),
                Cell(document.tag(verdict.choice, least)),
            ]
        )
    columns = ("model", "to take", "required", "s", "host", "disk", "least", "card to get", "runs")
    return Table("Answers", columns, rows, 1)


def _why(plain: Choice, document: Document) -> Table:
    memory = plain.record.memory
    figures = {
        "weights: what stays allocated when a run is over": memory.weights_bytes,
        "allocated peak: what its tensors take while it runs": memory.allocated_peak_bytes,
        "need: the smallest cap under which a fresh process completes": memory.need_bytes,
        "required: need and context, the free memory a card must have": memory.required_bytes,
        "nvidia-smi's peak, on a card with room": memory.nvml_process_peak_bytes,
    }
    rows = [[Cell(name), Cell(gib(value)), Cell(document.memory_tag(plain))] for name, value in figures.items()]
    return Table("Why", ("figure", "GiB", "run"), rows, 1)


def _flags(workloads: list[Workload], document: Document) -> Table:
    rows = []
    for workload in workloads:
        choices = {choice.name: choice for choice in _measured(workload, document)}
        choices |= {c.name: c for c in document.evidence.estimated(workload) if c.name not in choices}
        plain = baseline(list(choices.values()))
        for name in ("fp16", *(f"fp16+{flag}" for flag in FLAGS), "+".join(("fp16", *FLAGS))):
            choice = choices[name]
            saved, paid = against(choice, plain)
            rows.append(
                [
                    Cell(document.name(workload)),
                    Cell("", name=name, remark=f"({choice.remark})" if choice.remark else ""),
                    Cell(("~" if choice.estimated else "") + gib(choice.required_bytes)),
                    Cell("–" if saved is None else signed(saved / 2**30)),
                    Cell(seconds(choice.call_s)),
                    Cell("–" if paid is None else signed(paid)),
                    Cell(document.tag(choice)),
                ]
            )
    return Table("Flags", ("model", "optimizations", "required", "saved", "s", "paid", "runs"), rows, 2)


if __name__ == "__main__":
    PAGE.write_text(page(ROOT / "results"), encoding="utf-8")
    print(PAGE)
