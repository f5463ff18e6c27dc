"""Auxiliary responses for VRPO: 2M fresh responses per prompt from the reference policy.

    python -m commands.sample model=tiny model.archive=runs/SFT/LATEST datasets=[hh] data.hh.path=FILE sample.out=DIR

Writes DIR/<split>.jsonl, one row per labelled pair (all its columns, plus the auxiliary responses on the splits asked
for), which `python -m commands.annotate` completes and `datasets=[local]` reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import assembly
from commands.cli import Output, entry
from config.compose import Run
from data.schema import Example, Row
from engine import models, parallel, sampling
from losses.pairwise import DPO
from utils import UserError, log


@dataclass(frozen=True)
class Settings:
    """out: folder of the results. num_pairs: M, auxiliary pairs per row. splits: which get auxiliary responses (the others are
    written without). temperature 1, top_p 1: the reference policy itself, which VRPO presumes. max_new_tokens: null is
    max_length - max_prompt_length. batch_size: responses generated together. engine: hf, or vllm where it is installed."""

    out: str
    num_pairs: int = 1
    splits: tuple[str, ...] = ("train",)
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int | None = None
    batch_size: int = 64
    engine: str = "hf"

    def __post_init__(self) -> None:
        if self.num_pairs < 1:
            raise UserError(f"sample.num_pairs={self.num_pairs}: must be at least 1")
        if self.engine not in ("hf", "vllm"):
            raise UserError(f"sample.engine={self.engine}: must be hf or vllm")


def run(run: Run, settings: Settings) -> None:
    """Draw 2M responses per prompt from the model (model.archive= is the reference policy) and write JSONL."""
    config = run.config
    if run.model.archive is None and run.model.config is not None:
        log.warning("model.archive=null: sampling from an untrained model")
    tokenizer = models.load_tokenizer(run.model)
    data = assembly.load_data(run, tokenizer, DPO(beta=1.0))
    model = models.build_policy(
        run.model,
        archive=run.model.archive,
        seed=config.seed,
        device=parallel.pick_device(config.device),
        tokenizer=tokenizer,
    )
    provenance = {
        "model": run.plain["model"]["name"],
        "archive": run.model.archive,
        "weights": models.weights_hash(model),
        "seed": config.seed,
        **{k: v for k, v in asdict(settings).items() if k not in ("out", "batch_size", "splits")},
        "max_new_tokens": settings.max_new_tokens or config.max_length - config.max_prompt_length,
    }
    for split, rows in data.rows.items():
        sampled = split in settings.splits
        output = Output(
            Path(settings.out) / f"{split}.jsonl", {**provenance, "sampled": sampled, "split": split}
        )
        todo = [
            (row, example)
            for row, example in zip(rows, data.examples[split], strict=True)
            if row.uid not in output.done
        ]
        log.info("%s: %d rows, %d already there", split, len(rows), len(rows) - len(todo))
        step = max(1, settings.batch_size // (2 * settings.num_pairs)) * 8
        for start in tqdm(range(0, len(todo), step), desc=f"sample {split}", mininterval=1.0):
            part = todo[start : start + step]
            drawn = (
                draw(model, tokenizer, [row for row, _ in part], provenance, settings) if sampled else None
            )
            output.append(
                record(example, tokenizer, None if drawn is None else drawn[i], provenance)
                for i, (_, example) in enumerate(part)
            )
        log.info("wrote %s", output.path)


def draw(
    model: Any, tokenizer: Any, rows: Sequence[Row], provenance: Mapping[str, Any], settings: Settings
) -> list[list[sampling.Sample]]:
    """2M samples per row; a draw is a function of (seed, uid, index) alone."""
    number = 2 * settings.num_pairs
    prompts = [row.prompt for row in rows for _ in range(number)]
    keys = [(row.uid, i) for row in rows for i in range(number)]
    if settings.engine == "vllm":
        flat = with_vllm(provenance, prompts, keys, settings)
    else:
        flat = sampling.generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=provenance["max_new_tokens"],
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=provenance["seed"],
            keys=keys,
            batch_size=settings.batch_size,
        )
    return [flat[i * number : (i + 1) * number] for i in range(len(rows))]


def with_vllm(
    provenance: Mapping[str, Any], prompts: Sequence[np.ndarray], keys: Sequence[tuple], settings: Settings
) -> list[sampling.Sample]:
    """The same through vLLM: faster on a GPU; its draws are seeded per request but are not those of engine=hf."""
    try:
        import vllm
    except ImportError as error:
        raise UserError(
            "sample.engine=vllm: vLLM is not installed; pip install vllm, or sample.engine=hf"
        ) from error
    from engine.archives import find
    from utils import stream_seed

    if provenance["archive"] is None:
        raise UserError(
            "sample.engine=vllm: give model.archive=, a full model saved by a run or a Hugging Face directory"
        )
    llm = vllm.LLM(str(find(provenance["archive"])), trust_remote_code=False)
    parameters = [
        vllm.SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=provenance["max_new_tokens"],
            seed=stream_seed(provenance["seed"], "vllm", *key) % (1 << 31),
            skip_special_tokens=False,
        )
        for key in keys
    ]
    answers = llm.generate([{"prompt_token_ids": p.tolist()} for p in prompts], parameters)
    return [
        sampling.Sample(np.asarray(a.outputs[0].token_ids, np.int32), a.outputs[0].finish_reason == "stop")
        for a in answers
    ]


def record(
    example: Example, tokenizer: Any, drawn: Sequence[sampling.Sample] | None, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """One JSONL row: the labelled pair as it was, the auxiliary pairs, where they come from."""
    row: dict[str, Any] = {
        "uid": example.uid,
        "prompt": example.prompt,
        "chosen": example.response("chosen"),
        "rejected": example.response("rejected"),
        "group": example.group,
        "weight": example.weight,
        **{k: v for k, v in example.scalars.items()},
    }
    if drawn is not None:
        texts = [as_response(example, tokenizer.decode(s.ids, skip_special_tokens=True)) for s in drawn]
        row["aux_responses"] = [[a, b] for a, b in zip(texts[::2], texts[1::2], strict=True)]
        row["aux_finished"] = [[a.finished, b.finished] for a, b in zip(drawn[::2], drawn[1::2], strict=True)]
        row["aux_from"] = {
            k: provenance[k] for k in ("model", "weights", "seed", "temperature", "top_p", "max_new_tokens")
        }
    return row


def as_response(example: Example, text: str) -> Any:
    """A sampled text in the form of the row's own responses."""
    return text if isinstance(example.response("chosen"), str) else [{"role": "assistant", "content": text}]


if __name__ == "__main__":
    entry("sample", Settings, run)
