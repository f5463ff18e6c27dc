"""One contestant in a process of its own, so that its peak memory is its own. Driven by lines of JSON on standard input.

Started by `benchmarks.throughput` and `benchmarks.scaling`; not meant to be run by hand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from engine import runtime

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20


class Process:
    """The parent's end of a worker, which is killed after ``limit`` seconds."""

    def __init__(
        self,
        spec: dict[str, Any],
        limit: float | None = None,
        *,
        python: str = sys.executable,
        module: str = "benchmarks.worker",
    ) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": str(spec["threads"]), "HF_HUB_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [python, "-m", module, json.dumps(spec)],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._timer = threading.Timer(limit or 0.0, self._process.kill)
        self._timer.daemon = True
        if limit is not None:
            self._timer.start()
        self.loaded = self._read()

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the worker."""
        self._timer.cancel()
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            self._timer.cancel()
            raise RuntimeError(f"a worker ended with exit code {self._process.wait()}; its message is above")
        return json.loads(line)


# ---------------------------------------------------------------------------------------------- inside the worker


def _status(key: str) -> float:
    """MiB of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


class Memory:
    """Peak memory over what is in use at construction, in MiB: of the device, or resident in this process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.base = torch.cuda.memory_allocated(device) / MIB
        else:
            Path("/proc/self/clear_refs").write_text(
                "5", "ascii"
            )  # the peak starts again at the present size
            self.base = _status("VmRSS")

    def peak(self) -> float:
        """MiB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / MIB - self.base
        return _status("VmHWM") - self.base


def synchronise(device: torch.device) -> None:
    """Wait for the device, so that clocks measure work and not its submission."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def matmul_rate(device: torch.device, autocast: bool) -> float:
    """FLOP/s of a large matrix product in the precision that the contestants multiply in."""
    size = 8192 if device.type == "cuda" else 2048
    dtype = torch.bfloat16 if autocast else torch.float32
    # of random numbers: a GPU multiplies constants faster, because fewer bits change
    draw = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=draw, device=device, dtype=dtype) for _ in range(2))
    out = torch.mm(a, b)
    best = 0.0
    for _ in range(4):
        synchronise(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronise(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def profile(trainer: Any, rows: list, folder: Path, name: str) -> None:
    """One step under torch's profiler: a table (text) and a trace (chrome://tracing, Perfetto)."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    folder.mkdir(parents=True, exist_ok=True)
    cuda = trainer.device.type == "cuda"
    with torch_profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as seen:
        trainer.step(rows)
        synchronise(trainer.device)
    key = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    (folder / f"{name}.txt").write_text(seen.key_averages().table(sort_by=key, row_limit=40), "utf-8")
    seen.export_chrome_trace(str(folder / f"{name}.json.gz"))


def main() -> None:
    """Load, answer {"loaded": ..}, then answer each command until standard input ends."""
    from torch._dynamo.utils import counters

    from benchmarks.trainers import CONTESTANTS, Trainer
    from benchmarks.workloads import find_workload, inner, model_config, useful_flops

    out, sys.stdout = sys.stdout, sys.stderr  # nobody else may write to the pipe

    def say(**answer: Any) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    spec = json.loads(sys.argv[1])
    device = torch.device(spec["device"])
    torch.set_num_threads(spec["threads"])
    if spec["allocator"] == "keep":
        runtime.keep_freed_memory()
    workload = find_workload(spec["workload"])
    config = model_config(spec["model"], spec["vocab"])
    trainer = Trainer(
        CONTESTANTS[spec["contestant"]],
        workload,
        config,
        device=device,
        micro=spec["micro"],
        autocast=device.type == "cuda",
        lora=spec.get("lora", False),
    )
    steps = [workload.step(i, config["vocab_size"])[: spec["rows"]] for i in range(spec["steps"])]
    memory = Memory(device)
    positions: list[int] = []
    inner(trainer.model).base_model.register_forward_pre_hook(
        lambda _, args, kwargs: positions.append(
            (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).numel()
        ),
        with_kwargs=True,
    )
    say(vocabulary=config["vocab_size"], fill_seconds=trainer.fill_cache(steps))
    for line in sys.stdin:
        request = json.loads(line)
        if request["command"] == "step":
            rows = steps[request["index"]]
            positions.clear()
            synchronise(device)
            start, cpu = time.perf_counter(), time.process_time()
            loss = trainer.step(rows)
            synchronise(device)
            say(
                seconds=time.perf_counter() - start,
                cpu_seconds=time.process_time() - cpu,
                loss=loss,
                positions=sum(positions),
                flops=useful_flops(rows, trainer.model),
                peak_mib=memory.peak(),
                loaded_mib=memory.base,
                graphs=counters["stats"]["unique_graphs"],
            )
        elif request["command"] == "rate":
            say(flops_per_second=matmul_rate(device, device.type == "cuda"))
        else:
            profile(trainer, steps[0], Path(request["folder"]), spec["contestant"])
            say(done=True)


if __name__ == "__main__":
    main()
