"""The table for a GPU, unattended: Gemma-2B's shape (random weights, bf16 autocast), full and LoRA, ours against a padded step.

    python -m benchmarks.gpu OUT                 # at most 8 minutes; what does not fit is left out, and said
    python -m benchmarks.gpu OUT --dry-run       # the same on the CPU with a tiny model, in a minute or two

Every contestant is a process of its own, one after another: two copies of the model with their optimizers do not fit together.
OUT gets gpu.jsonl (a line as soon as it is measured) and gpu.md. Exit code 1 where losses differ or something failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.throughput import check_losses, summary
from benchmarks.worker import Process
from benchmarks.workloads import find_workload

WARM_UP = 3  # steps in which kernels are compiled; no graph may be compiled after them
AIM = 0.40  # of the measured bf16 matrix rate, HH-like, full fine-tuning


@dataclass(frozen=True)
class Case:
    """One contestant on one workload. micro: pairs of a forward pass."""

    workload: str
    contestant: str
    lora: bool
    rows: int
    micro: int


# in order of what one wants to know first; a padded forward of more pairs would not fit 80 GB with all logits
CASES = (
    *(
        Case("hh", side, lora, 16, micro)
        for lora in (False, True)
        for side, micro in (("ours", 8), ("padded", 4))
    ),
    *(Case("opinion", side, False, 64, micro) for side, micro in (("ours", 64), ("padded", 8))),
    *(Case("vrpo4", side, False, 8, micro) for side, micro in (("ours", 4), ("padded", 2))),
    Case("hh", "original", False, 16, 4),
    *(Case("opinion", side, True, 64, micro) for side, micro in (("ours", 64), ("padded", 8))),
)
DRY = tuple(Case(c.workload, c.contestant, c.lora, 4, 2) for c in CASES[:4])


def measure(case: Case, model: str, device: str, steps: int, limit: float) -> dict[str, Any]:
    """Losses, rates, memory and compiled graphs of ``steps`` steps after the warm-up. Ends after ``limit`` seconds."""
    spec = {
        **asdict(case),
        "model": model,
        "vocab": None,
        "steps": WARM_UP + steps,
        "threads": 1,  # of the host, which has little to do
        "allocator": "keep",
        "device": device,
    }
    started = time.perf_counter()
    worker = Process(spec, limit)
    seen = [worker.ask("step", index=i) for i in range(WARM_UP + steps)]
    rate = max(worker.ask("rate")["flops_per_second"] for _ in range(3))
    worker.close()
    return {
        **asdict(case),
        **summary(seen[WARM_UP - 1 :], case.rows, rate, worker.loaded),
        "matmul_tflops": rate / 1e12,
        "loaded_mib": seen[0]["loaded_mib"],
        "warm_up_seconds": seen[0]["seconds"],
        "graphs_after_warm_up": seen[-1]["graphs"] - seen[WARM_UP - 1]["graphs"],
        "losses": [s["loss"] for s in seen],
        "wall_seconds": time.perf_counter() - started,
    }


def run(
    cases: tuple[Case, ...], model: str, device: str, steps: int, limit: float
) -> Iterator[dict[str, Any]]:
    """Results as they come, or {"skipped"} and {"failed"} with the reason."""
    started, longest = time.perf_counter(), 0.0
    for case in cases:
        left = limit - (time.perf_counter() - started)
        if left < 1.3 * longest:
            yield {
                **asdict(case),
                "skipped": f"{left:.0f} s were left, and a case took up to {longest:.0f} s",
            }
            continue
        before = time.perf_counter()
        try:
            yield measure(case, model, device, steps, left)
        except (RuntimeError, OSError) as error:  # out of memory, say: the others are still worth having
            yield {**asdict(case), "failed": str(error)}
        longest = max(longest, time.perf_counter() - before)


def table(results: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Markdown. Ratios are to the padded contestant on the same workload."""
    lines = [
        f"{facts['device']}, torch {facts['torch']}, model {facts['model']}",
        "",
        "| workload | training | contestant | pairs/s | vs padded | positions/s | useful FLOPs of the matrix rate | "
        "peak memory | warm-up | graphs compiled later |",
        "|---" * 10 + "|",
    ]
    padded = {
        (r["workload"], r["lora"]): r["rows_per_second"]
        for r in results
        if r["contestant"] == "padded" and "rows_per_second" in r
    }
    for r in results:
        start = f"| {r['workload']} | {'LoRA' if r['lora'] else 'full'} | {r['contestant']} |"
        if "rows_per_second" not in r:
            lines.append(f"{start} {r.get('skipped') or r.get('failed')} |" + " |" * 6)
            continue
        base = padded.get((r["workload"], r["lora"]))
        ratio = f"{r['rows_per_second'] / base:.2f}x" if base else "-"
        lines.append(
            f"{start} {r['rows_per_second']:.2f} | {ratio} | "
            f"{r['positions_per_second']:.0f} | {100 * r['useful_fraction']:.1f} % of {r['matmul_tflops']:.0f} TFLOP/s | "
            f"{(r['loaded_mib'] + r['peak_mib']) / 1024:.1f} GiB | {r['warm_up_seconds']:.1f} s | "
            f"{r['graphs_after_warm_up']} |"
        )
    return "\n".join(lines) + "\n"


def problems(results: list[dict[str, Any]], device: str = "cuda") -> list[str]:
    """What is not as it has to be: failures, unequal losses, recompilation, slower than padded."""
    found = [f"{r['workload']}, {r['contestant']}: {r['failed']}" for r in results if "failed" in r]
    groups: dict[tuple[str, bool], dict[str, dict[str, Any]]] = {}
    for r in results:
        if "losses" in r:
            groups.setdefault((r["workload"], r["lora"]), {})[r["contestant"]] = r
    for (workload, lora), sides in groups.items():
        name = f"{workload}{', LoRA' if lora else ''}"
        for step, losses in enumerate(zip(*(r["losses"] for r in sides.values()), strict=True)):
            try:
                check_losses(f"{name}, step {step}", dict(zip(sides, losses, strict=True)), device)
            except SystemExit as error:
                found.append(str(error))
        ours = sides.get("ours")
        if ours and ours["graphs_after_warm_up"]:
            found.append(f"{name}: {ours['graphs_after_warm_up']} graphs were compiled after the warm-up")
        if ours and "padded" in sides and ours["rows_per_second"] < sides["padded"]["rows_per_second"]:
            found.append(f"{name}: ours is slower than padded")
        if ours and name == "hh" and ours["useful_fraction"] < AIM:
            found.append(f"{name}: {ours['useful_fraction']:.2f} of the matrix rate, below {AIM}")
    return found


def main(argv: list[str]) -> int:
    """Measure, write, and say what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="gemma_2b")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each contestant")
    parser.add_argument(
        "--limit", type=float, default=450.0, help="seconds after which no further case is started"
    )
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with a tiny model")
    options = parser.parse_args(argv)
    model, device, cases = options.model, "cuda", CASES
    if options.dry_run:
        model, device, cases = "tiny", "cpu", DRY
    elif not torch.cuda.is_available():
        print("error: there is no GPU here; --dry-run shows that the script works", file=sys.stderr)
        return 2
    for case in cases:
        find_workload(case.workload)
    options.out.mkdir(parents=True, exist_ok=True)
    facts = {
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else "CPU (dry run: the numbers mean nothing)",
        "torch": torch.__version__,
        "model": model,
    }
    results: list[dict[str, Any]] = []
    with (options.out / "gpu.jsonl").open("w", encoding="utf-8") as handle:
        for result in run(cases, model, device, options.steps, options.limit):
            results.append(result)
            handle.write(json.dumps({**facts, **result}) + "\n")
            handle.flush()
            (options.out / "gpu.md").write_text(table(results, facts), encoding="utf-8")
            print(table([result], facts).splitlines()[-1], flush=True)
    print(f"\n{table(results, facts)}")
    found = problems(results, device)
    if options.dry_run:  # speed on a CPU is not the question
        found = [p for p in found if "slower" not in p and "matrix rate" not in p]
    for problem in found:
        print(f"problem: {problem}")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
