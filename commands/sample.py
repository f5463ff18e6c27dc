"""Auxiliary responses for VRPO: 2M fresh responses per labelled pair from the reference policy.

    python -m commands.sample model=tiny model.archive=runs/SFT/LATEST datasets=[hh] data.hh.path=FILE sample.out=DIR

Writes DIR/<split>.jsonl, one row per labelled pair (all its columns, plus the auxiliary responses on the splits asked
for), which `python -m commands.annotate` completes and `datasets=[local]` reads. A killed command continues where it was.
DIR/two_sample-<split>.json compares the labelled responses with the drawn ones: VRPO presumes that they follow one law.
"""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

import run_data
import run_models
from commands import rows as jsonl
from commands import two_sample
from commands.cli import Output, entry
from config.compose import Run
from data.schema import Example, Row
from engine import archives, models, parallel, runtime, sampling
from losses.pairwise import DPO
from preference_datasets import Counts, Tokenization, tokenize
from trainers import autocast
from utils import UserError, content_hash, log, stream_seed, write_atomic

CHUNKS = 8  # generation batches between two writes: a killed command loses at most these
Draw = Callable[[Sequence[np.ndarray], Sequence[int], Sequence[tuple]], list[sampling.Sample]]


@dataclass(frozen=True)
class Settings:
    """out: folder of the results. num_pairs: M, auxiliary pairs per row. splits: which get auxiliary responses (the others are
    written without). temperature 1, top_p 1: the reference policy itself, which VRPO presumes. max_new_tokens: null is the
    room that max_length leaves after the prompt, as for the labelled responses. batch_size: responses generated together;
    what is drawn does not depend on it. engine: hf, or vllm where it is installed. check: rows whose labelled responses are
    compared with the drawn ones; 0 is none."""

    out: str
    num_pairs: int = 1
    splits: tuple[str, ...] = ("train",)
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int | None = None
    batch_size: int = 64
    engine: Literal["hf", "vllm"] = "hf"
    check: int = 256

    def __post_init__(self) -> None:
        for key, least in (("num_pairs", 1), ("batch_size", 1), ("check", 0)):
            if getattr(self, key) < least:
                raise UserError(f"sample.{key}={getattr(self, key)}: must be at least {least}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError(f"sample.max_new_tokens={self.max_new_tokens}: must be at least 1, or null")
        if not self.temperature > 0:
            raise UserError(
                f"sample.temperature={self.temperature}: must be > 0; 1 is the reference policy's own law"
            )
        if not 0 < self.top_p <= 1:
            raise UserError(f"sample.top_p={self.top_p}: must be in (0, 1]; 1 keeps every token")


def run(run: Run, settings: Settings) -> None:
    """Draw 2M responses per labelled pair from the reference policy (model.archive=) and write JSONL."""
    config = run.config
    runtime.configure(config.num_threads, config.allocator)
    if settings.engine == "vllm":
        require_vllm(run)
    if run.model.archive is None and run.model.config is not None:
        log.warning("model.archive=null: sampling from an untrained model")
    if (settings.temperature, settings.top_p) != (1.0, 1.0):
        log.warning(
            "sample.temperature=%g sample.top_p=%g: not the reference policy's own law, which VRPO presumes the labelled "
            "responses follow; the correction is then biased",
            settings.temperature,
            settings.top_p,
        )
    tokenizer = models.load_tokenizer(run.model)
    data = run_data.load_data(run, tokenizer, DPO(beta=1.0))
    stray = [split for split in settings.splits if split not in data.rows]
    if stray:
        raise UserError(
            f"sample.splits={list(settings.splits)}: no split {stray[0]!r}; there are {list(data.rows)}"
        )
    device = parallel.pick_device(config.device)
    model = models.build_reference(
        run.model,
        archive=run.model.archive,
        seed=config.seed,
        device=device if settings.engine == "hf" else "cpu",  # vLLM takes the device's memory for itself
        tokenizer=tokenizer,
    )
    draw = with_hf(run, settings, model, tokenizer) if settings.engine == "hf" else with_vllm(run, settings)
    origin = provenance(run, settings, model)
    for split, rows in data.rows.items():
        pairs = list(zip(rows, data.examples[split], strict=True))
        with autocast(config.precision, device):
            sample_split(run, settings, split, pairs, draw, tokenizer, origin)
    del draw
    model.to(device)
    advise_truncation(run)
    for split in settings.splits:
        if settings.check:
            scorer = run_models.build_scorer(run, model, "logps")
            with autocast(config.precision, device):
                check_laws(run, settings, split, scorer, tokenizer)


def provenance(run: Run, settings: Settings, model: Any) -> dict[str, Any]:
    """What decides the draws: part of the output's identity, and of every row."""
    adapter = models.POLICY_ADAPTER if models.is_peft(model) else None
    return {
        "model": run.model.name,
        "weights": models.weights_hash(model, adapter)[:16],
        "seed": run.config.seed,
        "precision": run.config.precision,
        **{k: v for k, v in asdict(settings).items() if k not in ("out", "batch_size", "splits", "check")},
    }


def room(row: Row, run: Run, settings: Settings) -> int:
    """Response tokens that fit after the row's prompt."""
    fits = run.config.max_length - len(row.prompt)
    return fits if settings.max_new_tokens is None else min(fits, settings.max_new_tokens)


def sample_split(
    run: Run,
    settings: Settings,
    split: str,
    pairs: Sequence[tuple[Row, Example]],
    draw: Draw,
    tokenizer: Any,
    origin: dict[str, Any],
) -> None:
    """Write DIR/<split>.jsonl; rows that are there already stay."""
    number = 2 * settings.num_pairs if split in settings.splits else 0
    read = content_hash(
        [[row.prompt.tolist(), room(row, run, settings), jsonl.to_row(example)] for row, example in pairs]
    )
    output = Output(Path(settings.out) / f"{split}.jsonl", {**origin, "responses": number, "rows": read[:16]})
    todo = [(row, example) for row, example in pairs if row.uid not in output.done]
    log.info("%s: %d rows, %d of them already there", split, len(pairs), len(pairs) - len(todo))
    step = max(1, settings.batch_size // max(number, 1)) * CHUNKS
    how, counts = tokenization(run), Counter()
    with tqdm(
        total=len(pairs), initial=len(pairs) - len(todo), unit="row", desc=split, mininterval=1.0
    ) as bar:
        for start in range(0, len(todo), step):
            part = todo[start : start + step]
            made = [jsonl.to_row(example) for _, example in part]
            if number:
                drawn = draw(
                    [row.prompt for row, _ in part for _ in range(number)],
                    [room(row, run, settings) for row, _ in part for _ in range(number)],
                    [(row.uid, i) for row, _ in part for i in range(number)],
                )
                for i, (row, example) in enumerate(part):
                    mine = drawn[i * number : (i + 1) * number]
                    texts = [as_text(sample, row.prompt, tokenizer, how) for sample in mine]
                    jsonl.add_auxiliary(made[i], [t for t, _ in texts], [finished for _, finished in texts])
                    made[i]["aux_from"] = origin
                    count_samples(example, mine, texts, tokenizer, how, counts)
            output.append(made)
            bar.update(len(part))
    report_counts(split, counts)
    log.info("wrote %s", output.path)


def tokenization(run: Run) -> Tokenization:
    """How the run reads its first data set."""
    return run_data.tokenization(run, run.datasets[0])


def as_text(
    sample: sampling.Sample, prompt: np.ndarray, tokenizer: Any, how: Tokenization
) -> tuple[str, bool]:
    """(text, finished) of a sample.

    A sample cut inside a character of several tokens loses that character. One that is cut and has no text is scored as
    an empty, finished response: there would be nothing else to score.
    """
    before = (
        prompt if how.mode == "joint" else prompt[:0]
    )  # some tokenizers have a leading space only in company

    def decode(ids: np.ndarray) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    text = decode(np.concatenate((before, sample.ids)))[len(decode(before)) :]
    if not sample.finished:
        text = text.rstrip("\ufffd")
    return text, sample.finished or not text


def count_samples(
    example: Example,
    samples: Sequence[sampling.Sample],
    texts: Sequence[tuple[str, bool]],
    tokenizer: Any,
    how: Tokenization,
    counts: Counter[str],
) -> None:
    """How many were drawn, cut, empty, and have other tokens once training reads them as text."""
    written = replace(
        example,
        responses=tuple(("aux_1", text) for text, _ in texts),
        response_scalars={"finished": tuple(float(finished) for _, finished in texts)},
    )
    (row,) = tokenize(
        [written],
        tokenizer,
        replace(how, truncation="keep_end", max_length=10**9),
        groups=(example.group,),
        roles=("aux_1",),
        optional_roles=("aux_1",),
        counts=Counts(),
    )
    counts["drawn"] += len(samples)
    counts["cut"] += sum(not s.finished for s in samples)
    counts["empty"] += sum(not text for text, _ in texts)
    counts["other_ids"] += sum(
        not np.array_equal(s.ids, r) for s, r in zip(samples, row.responses, strict=True)
    )


def report_counts(split: str, counts: Counter[str]) -> None:
    """One line about the samples, and a warning where text does not carry them."""
    drawn = counts["drawn"]
    if not drawn:
        return
    log.info(
        "%s: %d responses drawn, %d cut at their limit, %d empty",
        split,
        drawn,
        counts["cut"],
        counts["empty"],
    )
    if counts["other_ids"] > 0.01 * drawn:
        log.warning(
            "%s: %d of %d responses have other tokens once written as text and read again (a model that has learnt its data "
            "rarely does that): they no longer follow the reference policy exactly",
            split,
            counts["other_ids"],
            drawn,
        )


def with_hf(run: Run, settings: Settings, model: Any, tokenizer: Any) -> Draw:
    """Draws of engine.sampling: a function of (seed, uid, index) alone."""

    def draw(
        prompts: Sequence[np.ndarray], limits: Sequence[int], keys: Sequence[tuple]
    ) -> list[sampling.Sample]:
        return sampling.generate(
            model,
            tokenizer,
            prompts,
            max_new_tokens=limits,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=run.config.seed,
            keys=keys,
            batch_size=settings.batch_size,
        )

    return draw


def require_vllm(run: Run) -> Any:
    """The module, where it is installed and can read the run's model."""
    if run.model.archive is None or not (archives.find(run.model.archive) / "config.json").is_file():
        raise UserError(
            f"sample.engine=vllm model.archive={run.model.archive}: vLLM reads whole models in Hugging Face's format: give such a "
            "folder, RUN/LATEST of a run, or of a LoRA run RUN/merged"
        )
    try:
        return importlib.import_module("vllm")
    except ImportError as error:
        raise UserError(
            f"sample.engine=vllm: vLLM cannot be imported ({error}); pip install vllm, or sample.engine=hf"
        ) from error


def with_vllm(run: Run, settings: Settings) -> Draw:
    """The same through vLLM: faster on a GPU; its draws are seeded per request but are not those of engine=hf."""
    vllm = require_vllm(run)
    # its own choice for float32 weights would be half precision, which is another law; it has no float64
    dtype = "bfloat16" if run.config.precision == "bf16" else run.model.reference_dtype
    dtype = "float32" if dtype == "float64" else dtype
    llm = vllm.LLM(str(archives.find(run.model.archive)), dtype=dtype, trust_remote_code=False)

    def draw(
        prompts: Sequence[np.ndarray], limits: Sequence[int], keys: Sequence[tuple]
    ) -> list[sampling.Sample]:
        parameters = [
            vllm.SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_tokens=limit,
                seed=stream_seed(run.config.seed, "vllm", *key) % (1 << 31),
                skip_special_tokens=False,
            )
            for key, limit in zip(keys, limits, strict=True)
        ]
        answers = llm.generate([{"prompt_token_ids": p.tolist()} for p in prompts], parameters)
        found = [a.outputs[0] for a in answers]
        return [sampling.Sample(np.asarray(o.token_ids, np.int32), o.finish_reason == "stop") for o in found]

    return draw


def advise_truncation(run: Run) -> None:
    """The files are read as datasets=[local], whose rule of truncation may differ from that of the source."""
    used = {run_data.tokenization(run, spec).truncation for spec in run.datasets}
    if used != {"keep_start"} and run.config.truncation is None:
        log.info("train on these files with truncation=%s, as here", ", ".join(sorted(used)))


def check_laws(run: Run, settings: Settings, split: str, scorer: Any, tokenizer: Any) -> None:
    """Compare labelled and drawn responses of DIR/<split>.jsonl; the result goes to DIR/two_sample-<split>.json."""
    labelled = jsonl.read(Path(settings.out) / f"{split}.jsonl")
    found = two_sample.compare(
        [one.example for one in labelled], tokenizer, tokenization(run), scorer, settings.check
    )
    path = Path(settings.out) / f"two_sample-{split}.json"
    write_atomic(path, json.dumps(found.to_dict(), indent=1) + "\n")
    found.log(split)


if __name__ == "__main__":
    entry("sample", Settings, run)
