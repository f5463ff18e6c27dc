"""Speed and memory of a training step, ours against the original DPO repository's, printed as ratios.

    python -m benchmarks.throughput hh                     # original vs ours
    python -m benchmarks.throughput hh --simple            # only the scoring differs: padded vs shared
    python -m benchmarks.throughput opinion vrpo4 vrpo10 --model small_vocab
    python -m benchmarks.throughput hh --trl PYTHON        # TRL's DPOTrainer vs ours; with --simple both references are live
    python -m benchmarks.throughput hh --device cuda       # for Gemma-2B's shape see benchmarks.gpu

Each contestant has a process of its own (its peak memory is its own) and they take turns step by step (other load on the
machine falls on both). Weights, rows, loss, threads and allocator settings are the same on both sides, and so must be the
losses of every step, or the run fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

from benchmarks.worker import Process
from benchmarks.workloads import MODELS, WORKLOADS, find_workload, model_config, padding

# Losses of equal steps differ by rounding, which AdamW's first steps magnify where gradients are nearly zero
TRL = (
    "trl",
    "trl_live",
)  # DPOTrainer with log-probs of the reference computed before training, or in every step
LOSS_TOLERANCE = {"cpu": 2e-3, "cuda": 5e-2}  # cuda: bf16


def workload_name(text: str) -> str:
    """``text``, if it names a workload."""
    try:
        find_workload(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def parse(argv: list[str]) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "workload",
        nargs="+",
        type=workload_name,
        help=f"{', '.join(WORKLOADS)}, or a shape, e.g. 512x128x4: prompt, responses, how many",
    )
    parser.add_argument("--model", default="bench", choices=list(MODELS))
    parser.add_argument("--vocab", type=int, help="another vocabulary size")
    parser.add_argument(
        "--simple", action="store_true", help="same optimizer and live reference on both sides"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each contestant")
    parser.add_argument("--rows", type=int, help="rows of an optimizer step (default: the workload's)")
    parser.add_argument(
        "--micro", type=int, help="rows per forward pass of the other side (default: the workload's)"
    )
    parser.add_argument(
        "--our-micro", type=int, help="rows per forward pass of ours (default: as the other side)"
    )
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--allocator", choices=["keep", "default"], default="keep", help="keep: glibc holds freed memory"
    )
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="cuda: bf16 autocast on both sides"
    )
    parser.add_argument(
        "--profile", type=Path, metavar="DIR", help="also profile one step of each: text and trace"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="append the results, one JSON object a line"
    )
    parser.add_argument(
        "--trl",
        metavar="PYTHON",
        help="against TRL's DPOTrainer, in this interpreter, which can import trl (CPU)",
    )
    options = parser.parse_args(argv)
    if options.trl is not None:
        problem = _unfit_for_trl(options)
        if problem:
            parser.error(f"--trl={options.trl}: {problem}")
    return options


def _unfit_for_trl(options: argparse.Namespace) -> str | None:
    """Why DPOTrainer cannot take part, or None."""
    if options.device != "cpu" or any(
        len(find_workload(w).step(0, 9)[0].responses) > 2 for w in options.workload
    ):
        return "is compared on the CPU, with workloads of pairs"
    try:
        tried = subprocess.run([options.trl, "-c", "import trl"], capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    if tried.returncode == 0:
        return None
    last = (tried.stderr.strip().splitlines() or ["no message"])[-1]
    return f"cannot import trl there ({last}); make an environment with this project's requirements and `pip install trl`"


def race(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run both contestants on a workload, taking turns; the result as printed."""
    workload = find_workload(name)
    other, ours = ("padded", "shared") if options.simple else ("original", "ours")
    if options.trl is not None:
        other, ours = TRL[options.simple], "shared" if options.simple else "ours"
    rows, micro = options.rows or workload.rows, options.micro or workload.micro
    spec = {
        "workload": name,
        "model": options.model,
        "vocab": options.vocab,
        "rows": rows,
        "steps": options.repeats + 1,
        "threads": options.threads,
        "allocator": options.allocator,
        "device": options.device,
    }
    micros = {other: micro, ours: options.our_micro or micro}
    where = {c: {"python": options.trl, "module": "benchmarks.trl_worker"} for c in TRL}
    workers = {
        c: Process({**spec, "contestant": c, "micro": m}, **where.get(c, {})) for c, m in micros.items()
    }
    seen: dict[str, list[dict[str, Any]]] = {c: [] for c in workers}
    rates = []
    for index in range(spec["steps"]):  # the first one warms up
        for c in list(workers)[:: 1 if index % 2 else -1]:
            seen[c].append(workers[c].ask("step", index=index))
        rates.append(workers[ours].ask("rate")["flops_per_second"])
        losses = {c: steps[-1]["loss"] for c, steps in seen.items()}
        check_losses(f"{name}: step {index}", losses, options.device)
    if options.profile is not None:
        for worker in (w for c, w in workers.items() if c not in TRL):
            worker.ask("profile", folder=str((options.profile / name).resolve()))
    for worker in workers.values():
        worker.close()
    sides = {c: summary(steps, rows, max(rates), workers[c].loaded) for c, steps in seen.items()}
    vocab = model_config(options.model, options.vocab)["vocab_size"]
    return {
        **spec,
        "micro": micros,
        "torch": torch.__version__,
        "padding": mean(padding(workload.step(i, vocab)[:rows], micro) for i in range(1, spec["steps"])),
        "matmul_gflops": max(rates) / 1e9,
        "sides": sides,
        "speed_ratio": sides[other]["seconds_per_step"] / sides[ours]["seconds_per_step"],
        "cpu_ratio": sides[other]["cpu_seconds_per_step"] / sides[ours]["cpu_seconds_per_step"],
        "memory_ratio": sides[ours]["peak_mib"] / sides[other]["peak_mib"],
    }


def check_losses(where: str, losses: dict[str, float], device: str = "cpu") -> None:
    """Stop where the contestants' losses differ by more than rounding."""
    if not np.ptp(list(losses.values())) <= LOSS_TOLERANCE[device]:  # NaN included
        raise SystemExit(f"{where}: losses {losses}: not the same training")


def summary(steps: list[dict[str, Any]], rows: int, rate: float, loaded: dict[str, Any]) -> dict[str, Any]:
    """A contestant's steps but for the first, which warms up, together. rate: FLOP/s of matrix products."""
    timed = steps[1:]
    seconds, cpu, positions, flops = (
        sum(s[key] for s in timed) for key in ("seconds", "cpu_seconds", "positions", "flops")
    )
    return {
        "rows_per_second": rows * len(timed) / seconds,
        "seconds_per_step": seconds / len(timed),
        "cpu_seconds_per_step": cpu / len(timed),
        "step_seconds": [s["seconds"] for s in timed],
        "positions_per_second": positions / seconds,
        "useful_fraction": flops / seconds / rate,
        "useful_gflop_per_row": flops / len(timed) / rows / 1e9,
        "peak_mib": steps[-1]["peak_mib"],
        "fill_seconds": loaded["fill_seconds"],
        "last_loss": steps[-1]["loss"],
    }


def show(result: dict[str, Any]) -> None:
    """Print one result."""
    print(
        f"\n{result['workload']} on {result['model']}: {result['rows']} rows a step, padding {result['padding']:.2f}x, "
        f"{result['threads']} threads, matrix products {result['matmul_gflops']:.0f} GFLOP/s, allocator={result['allocator']}"
    )
    for name, side in result["sides"].items():
        print(
            f"  {name:9s} {side['rows_per_second']:8.2f} rows/s   {side['positions_per_second']:7.0f} positions/s   "
            f"useful FLOPs {100 * side['useful_fraction']:5.1f} % of the matrix rate   peak {side['peak_mib']:7.0f} MiB "
            f"over loading   cache filled in {side['fill_seconds']:.1f} s   loss {side['last_loss']:.5f}   "
            f"({result['micro'][name]} rows a forward)"
        )
    print(
        f"  ours: {result['speed_ratio']:.2f}x the speed ({result['cpu_ratio']:.2f}x less CPU time), "
        f"{result['memory_ratio']:.2f}x the memory"
    )


def main(argv: list[str]) -> None:
    """Run the chosen workloads one after another."""
    options = parse(argv)
    for name in options.workload:
        result = race(name, options)
        show(result)
        if options.json is not None:
            with options.json.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
