"""TRL's DPOTrainer as a contestant: same weights, rows, micro-batches, optimizer and clipping as ours.

Started by `benchmarks.throughput --trl PYTHON` with an interpreter that has trl (this project does not depend on it); answers
the same lines of JSON as `benchmarks.worker`. Only tokenisation is skipped, because the rows are ids already.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from benchmarks.worker import ROOT, Memory
from benchmarks.workloads import build_model, find_workload, model_config, useful_flops
from engine import runtime


class InOrder(DPOTrainer):
    """DPOTrainer on rows that are ids already, in their order; ``losses`` are those of the micro-batches."""

    losses: list[torch.Tensor]

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        found = super().compute_loss(*args, **kwargs)
        self.losses.append((found[0] if isinstance(found, tuple) else found).detach())
        return found


class Turns(TrainerCallback):
    """Waits for a "step" command before every optimizer step and answers after it."""

    def __init__(self, out: Any, steps: list[list], model: torch.nn.Module) -> None:
        self.out, self.steps, self.model = out, steps, model
        self.trainer: InOrder | None = None
        self.positions: list[int] = []
        model.base_model.register_forward_pre_hook(
            lambda _, args, kwargs: self.positions.append(
                (kwargs["input_ids"] if "input_ids" in kwargs else args[0]).numel()
            ),
            with_kwargs=True,
        )

    def say(self, **answer: Any) -> None:
        """One line of JSON."""
        self.out.write(json.dumps(answer) + "\n")
        self.out.flush()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See the class."""
        request = json.loads(sys.stdin.readline() or "null")
        if request is None:  # the parent is gone
            raise SystemExit(1)
        assert request == {"command": "step", "index": state.global_step}, request
        self.positions.clear()
        self.trainer.losses.clear()
        self.start, self.cpu = time.perf_counter(), time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See the class."""
        self.say(
            seconds=time.perf_counter() - self.start,
            cpu_seconds=time.process_time() - self.cpu,
            loss=torch.stack(self.trainer.losses).mean().item(),
            positions=sum(self.positions),
            flops=useful_flops(self.steps[state.global_step - 1], self.model),
            peak_mib=self.memory.peak(),
        )


def main() -> None:
    """See the module."""
    out, sys.stdout = sys.stdout, sys.stderr  # nobody else may write to the pipe
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    if spec["allocator"] == "keep":
        runtime.keep_freed_memory()
    config, device = model_config(spec["model"], spec["vocab"]), torch.device("cpu")
    workload = find_workload(spec["workload"])
    steps = [workload.step(i, config["vocab_size"])[: spec["rows"]] for i in range(spec["steps"])]
    columns = [
        {
            "prompt_ids": row.prompt.tolist(),
            "chosen_ids": row.responses[0].tolist(),
            "rejected_ids": row.responses[1].tolist(),
        }
        for rows in steps
        for row in rows
    ]
    model, reference = build_model(config, 0, device), build_model(config, 1, device).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    turns = Turns(out, steps, model)
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder,
            use_cpu=True,
            beta=workload.loss.beta,
            per_device_train_batch_size=spec["micro"],
            gradient_accumulation_steps=spec["rows"] // spec["micro"],
            num_train_epochs=1,
            max_grad_norm=10.0,
            max_length=None,
            bf16=False,
            gradient_checkpointing=False,
            precompute_ref_log_probs=spec["contestant"] == "trl",
            precompute_ref_batch_size=spec["micro"],
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        turns.memory = Memory(device)
        start = time.perf_counter()
        trainer = InOrder(
            model=model,
            ref_model=reference,
            args=settings,
            train_dataset=Dataset.from_list(columns),
            processing_class=AutoTokenizer.from_pretrained(ROOT / "assets" / "tokenizer"),
            callbacks=[turns],
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
        )
        del reference
        turns.trainer, trainer.losses = trainer, []
        turns.say(vocabulary=config["vocab_size"], fill_seconds=time.perf_counter() - start)
        trainer.train()


if __name__ == "__main__":
    main()
