"""Command-line words of the older repositories -> ours, before Hydra composes anything.

Sources: eric-mitchell/direct-preference-optimization and rsshyam/Group-robust-preference-optimization, config/ and
scripts/. docs/keys.md is the table for people.
"""

from __future__ import annotations

import re

from utils import UserError, log

# their key -> ours
RENAMED = {
    "loss.step_size": "weighting.step_size",
    "loss.adj": "weighting.adj",
    "loss.adaptive_step_size": "weighting.adaptive_step_size",
    "loss.step_factor": "weighting.step_factor",
    "loss.imp_weights": "weighting.imp_weights",
    "min_lr": "stopping.min_lr",
    "patience_factor": "stopping.patience_factor",
    "scheduler_metric": "stopping.scheduler_metric",
    "exp_group": "wandb.tags",
    "model_archive": "model.archive",
}

# keys that mean nothing any more: the value that is passed over, and what to say otherwise
RETIRED = {
    "fsdp_port": "the launcher finds a free port",
    "local_dirs": "run directories are run_root/exp_name: set run_root=DIR",
    "local_run_dir": "set run_dir=DIR",
    "group_name": "W&B groups runs by their configuration; name the run with exp_name=",
    "active": "the reference never read it",
    "group_handling": "the reference never read it",
    "debug": "use wandb.enabled=false and a small n_examples=",
    "minimum_log_interval_secs": "every step is logged",
    "eval_train_every": "training rows are evaluated with the others: eval_train_data=true and eval_every=",
    "eval_train_end": "eval_train_data=true evaluates training rows with the other splits, and at the end",
    "eval_full": "use n_eval_examples=null",
    "eval_train_full": "use n_eval_examples=null eval_train_data=true",
    "use_kfoldsplit": "use data.<name>.kfold=FOLD (fold 0 is fold 0)",
    "train_frac": "use data.<name>.train_frac=",
    "test_dataset": "use data.<name>.max_rows=",
    "wandb.key": "keys never belong in a config: set WANDB_API_KEY or run `wandb login`",
    "loss.normalize_loss": "it was always off",
    "use_ref": "loss=base evaluates without a reference",
    "max_train_examples": "use n_examples=",
    "model@data_selection.model": "the selection's models have the architecture of model=",
}
NEUTRAL = {"null", "false", "0", "none", "~", "''", '""'}
NEUTRAL_TRUE = ("use_ref",)  # here it is true that means nothing

TRAINERS = {"parallel_fsdp": "FSDPTrainer", "TensorParallelTrainer": None, "parallel_tensor": None}

HYDRA_FLAGS = re.compile(
    r"^--(help|hydra-help|version|cfg|resolve|package|run|multirun|shell-completion|config-path|config-name"
    r"|config-dir|experimental-rerun|info)($|=)"
)


def split_flags(argv: list[str]) -> tuple[list[str], list[str]]:
    """(Hydra's own flags, overrides). ``--model.archive X`` and ``--model_archive=X`` become ``model.archive=X``."""
    flags, overrides = [], []
    words = iter(argv)
    for word in words:
        if HYDRA_FLAGS.match(word):
            flags.append(word)
            takes_value = word in ("--cfg", "--package", "--config-path", "--config-name", "--config-dir")
            if takes_value and (value := next(words, None)) is not None:
                flags.append(value)
        elif word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            if not equals and (value := next(words, None)) is None:
                raise UserError(f"{word}: a value is missing; write {key}=VALUE")
            overrides.append(f"{key}={value}")
        elif word.startswith("-") and "=" not in word:
            flags.append(word)
            if word in ("-c", "-p", "-cp", "-cn", "-cd") and (value := next(words, None)) is not None:
                flags.append(value)
        else:
            overrides.append(word)
    return flags, overrides


def renamed(key: str, value: str) -> list[str]:
    """Their value under our key. A neutral value is kept, for it may turn off what a preset has turned on; where the part has
    no such key, ``compose`` passes over it."""
    if value.lower() not in NEUTRAL:
        if key == "wandb.tags" and not value.startswith("["):
            value = f"[{value}]"  # theirs is one name
        if key == "weighting.step_size":
            log.info(
                "loss.step_size=%s is taken as weighting.step_size, which is the reference's times its batch size: 8e-6 for "
                "its 5e-7 at batch 16; weighting.reference=true takes its number",
                value,
            )
        return [f"{key}={value}"]
    if key in ("weighting.step_size", "weighting.adj"):
        return [f"{key}=0"]
    if key == "weighting.adaptive_step_size":
        return [f"{key}=false"]
    unset = (
        "weighting.imp_weights",
        "stopping.patience_factor",
        "stopping.scheduler_metric",
        "model.archive",
    )
    # of the other keys the reference's neutral value means its default
    return [f"{key}=null"] if key in unset else []


def check_equal_weights(value: str, overrides: list[str]) -> None:
    """Their dpowts is importance sampling with the same weight for every group: the default of ours. UserError without it."""
    given = dict(word.partition("=")[::2] for word in overrides)
    if given.get("loss.importance_sampling", "false").lower() in NEUTRAL:
        raise UserError(
            f"loss.dpowts={value}: the reference reads it only with loss.importance_sampling=true; give both, or "
            "weighting=importance"
        )
    log.info(
        "loss.dpowts=%s: every group counts 1/K here, 0.5 whatever their number K in the reference", value
    )


def translate(overrides: list[str]) -> list[str]:
    """Their overrides -> ours, order kept. Raises UserError where the old word has no meaning here."""
    out = []
    for word in overrides:
        key, equals, value = word.partition("=")
        key = key.lstrip("+")
        if not equals:
            out.append(word)  # ~deletions and the like are Hydra's business
        elif key == "loss" and value == "grpo":
            raise UserError(
                "loss=grpo has two meanings: group ROBUST preference optimization is loss=gr_dpo or loss=gr_ipo "
                "(aliases rdpo, ripo, gripo); group RELATIVE policy optimization (grpo_relative) is an online "
                "algorithm that this release does not have"
            )
        elif key == "trainer" and value in TRAINERS:
            if TRAINERS[value] is None:
                raise UserError(
                    f"trainer={value}: there is no tensor parallelism here; use trainer=FSDPTrainer"
                )
            out.append(f"trainer={TRAINERS[value]}")
        elif key == "loss.importance_sampling":
            if value.lower() not in NEUTRAL:
                out.append("weighting=importance")
        elif key == "loss.dpowts":
            if value.lower() not in NEUTRAL:
                check_equal_weights(value, overrides)
        elif key in RETIRED:
            if value.lower() not in (("true",) if key in NEUTRAL_TRUE else NEUTRAL):
                raise UserError(f"{key}={value}: this key is gone; {RETIRED[key]}")
            log.info("%s=%s has no meaning here and is passed over: %s", key, value, RETIRED[key])
        elif key == "loss.divide_by_totalcount":
            if value.lower() in NEUTRAL:
                out.append("weighting.normalizer=in_batch_mean")  # true is our default
        elif key in RENAMED:
            out += renamed(RENAMED[key], value)
        else:
            out.append(word)
    return out
