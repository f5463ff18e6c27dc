"""A Trainer on random rows and a tiny model, without text, tokenizers or Hydra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from config.build import build
from config.compose import CONFIG_DIR
from config.schema import Config
from data.plan import Plan
from data.schema import Row
from engine.evaluation import Evaluator
from engine.metrics import MetricsLog, WandbSettings
from engine.optim import Schedule, build_optimizer
from engine.parallel import World
from engine.reference import LiveReference
from engine.scoring import Scorer
from engine.stopping import NoStopping
from trainers import Parts, Trainer
from utils import global_rng_untouched, stream
from weighting import Uniform

GROUPS = ("big", "mid", "small")
SHAPES = {
    "llama": {"num_key_value_heads": 1, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2},
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}  # fmt: skip


def make_model(kind: str = "gpt2", dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.nn.Module:
    """A causal LM of a few thousand parameters with weights large enough to matter.

    GPT-2 by default: transformers computes Llama's and Gemma's norms in float32 whatever the dtype, which blurs float64 at 1e-7.
    """
    config = AutoConfig.for_model(
        kind, vocab_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2, **SHAPES[kind]
    )
    with global_rng_untouched():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        for p in model.parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.2)
    return model.to(dtype)


def make_rows(num: int = 24, seed: int = 0, prompts: int = 9) -> list[Row]:
    """Pairs of random tokens; prompts repeat; group sizes 3:2:1; weights and soft labels differ."""
    rng = stream(seed, "test rows")
    pool = [rng.integers(3, 32, size=int(n)).astype(np.int32) for n in rng.integers(1, 9, size=prompts)]
    rows = []
    for i in range(num):
        which = int(rng.integers(prompts))
        responses = tuple(
            np.append(rng.integers(3, 32, size=int(n)), 2).astype(np.int32)
            for n in rng.integers(0, 7, size=2)
        )
        rows.append(
            Row(
                f"r:{i}", pool[which], responses, ("chosen", "rejected"), int(rng.choice(3, p=[0.5, 0.3, 0.2])),
                f"p{which}", weight=float(rng.uniform(0.5, 1.5)), scalars={"p_chosen": float(rng.uniform(0.5, 1.0))},
            )
        )  # fmt: skip
    return rows


def make_config(**changes: Any) -> Config:
    values = yaml.safe_load((CONFIG_DIR / "config.yaml").read_text(encoding="utf-8"))
    values = {k: v for k, v in values.items() if k not in ("defaults", "hydra")}
    values["trainer"] = yaml.safe_load(
        (CONFIG_DIR / "trainer" / "BasicTrainer.yaml").read_text(encoding="utf-8")
    )
    values |= {
        "exp_name": "test",
        "run_dir": "unused",
        "lr": 0.01,
        "batch_size": 6,
        "n_epochs": 2,
        "eval_every": 12,
    }
    return build(Config, values | changes, "")


def make_trainer(
    run_dir: Path,
    loss: Any,
    *,
    rows: list[Row] | None = None,
    model: torch.nn.Module | None = None,
    kind: str = "gpt2",
    dtype: torch.dtype = torch.float64,
    layout: str = "shared_prefix",
    weighting: Any = None,
    stopping: Any = None,
    world: World | None = None,
    **changes: Any,
) -> Trainer:
    """A ready Trainer; ``changes`` are top-level config keys."""
    config = make_config(**changes)
    world = world or World(0, 1, torch.device("cpu"), "none")
    rows = rows if rows is not None else make_rows()
    model = (model or make_model(kind, dtype)).to(world.device)
    scorer = Scorer(model, layout=layout)
    plan = Plan(
        rows,
        seed=config.seed,
        batch_size=config.batch_size,
        n_epochs=config.n_epochs,
        n_examples=config.n_examples,
        num_groups=3,
    )
    reference = (
        LiveReference(Scorer(make_model(kind, dtype, seed=1).to(world.device), layout=layout))
        if loss.needs.reference
        else None
    )
    run_dir.mkdir(parents=True, exist_ok=True)
    return Trainer(
        Parts(
            config=config,
            world=world,
            run_dir=run_dir,
            policy=scorer,
            reference=reference,
            loss=loss,
            weighting=(weighting or Uniform()).build(GROUPS, plan.group_counts.tolist(), plan.group_probs.tolist()),
            stopper=(stopping or NoStopping()).build(lr=config.lr, num_examples=len(rows), eval_every=config.eval_every),
            optimizer=build_optimizer(config.optimizer, list(scorer.parameters()), lr=config.lr),
            schedule=Schedule(config.lr, 0, plan.num_steps),
            plan=plan,
            rows=rows,
            evaluator=Evaluator(
                splits={"validation": make_rows(11, seed=7)}, groups=GROUPS, loss=loss, reference=reference, world=world,
                run_dir=run_dir, batch_size=config.eval_batch_size, per_group=None,
            ),
            metrics=MetricsLog(run_dir, wandb=WandbSettings(enabled=False), config={}, identity={}, groups=GROUPS),
            model_writer=lambda: lambda path: scorer.model.save_pretrained(path),
            read_model=lambda path: None,
            facts={},
            extra_state={},
        ),
        GROUPS,
    )  # fmt: skip


def parameters(trainer: Trainer) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().double().reshape(-1) for p in trainer.policy.parameters()])
