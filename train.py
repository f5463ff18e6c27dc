"""Entry: `python train.py key=value ...`. Composes and validates the config, starts the ranks, hands over to assembly.

Exit codes: 0 done, 1 a failure of ours, 2 a mistake the user can mend, 143/130 checkpointed on SIGTERM/SIGINT.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from config.compose import Run, composition_problem, prepare, resolve
from utils import UserError, log, rank, setup_logging

ROOT = Path(__file__).resolve().parent


def launch(run: Run, overrides: list[str]) -> int:
    """Start one process per device; the exit code of the rank that failed first."""
    from engine.launch import run_ranks
    from engine.parallel import pick_device

    nproc = run.config.trainer.nproc
    if nproc is None:
        import torch

        nproc = torch.cuda.device_count() if pick_device(run.config.device).type == "cuda" else 1
    run.config.check_world(nproc)
    command = [sys.executable, str(ROOT / "train.py"), *overrides]
    return run_ranks(command, nproc, run.config.trainer.timeout_s)


failures: list[BaseException] = []  # of jobs; Hydra would print its own story about them


@hydra.main(version_base="1.3", config_path="config", config_name="config")
def task(cfg: DictConfig) -> float | None:
    """One job: the only one, or one of a multirun, whose other jobs go on if it fails, but not if it was told to stop."""
    setup_logging()  # again: Hydra has reset logging
    try:
        return job(cfg)
    except (Exception, SystemExit) as error:  # main raises one of them again
        failures.append(error)
        if isinstance(error, SystemExit) and error.code in (130, 143):
            raise
        if tell(error):
            raise
        return None


def tell(error: BaseException) -> bool:
    """In a multirun, which job failed: the others go on, and main tells of one only. True where a launcher runs this job
    in another process than main's (Slurm), which has to be told."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    facts = HydraConfig.get()
    if facts.mode is not RunMode.MULTIRUN:
        return False
    words = " ".join(facts.overrides.task)
    log.error("job %s failed (%s): %s", facts.job.num, words, str(error) or type(error).__name__)
    return not facts.launcher["_target_"].endswith("BasicLauncher")


def job(cfg: DictConfig) -> float | None:
    """Train; the watched metric, for sweepers."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    run = resolve(cfg, HydraConfig.get().overrides.task)
    if HydraConfig.get().mode is RunMode.MULTIRUN:
        log.info("job %d: %s", HydraConfig.get().job.num, run.config.run_dir)
    if run.config.trainer.parallel != "none" and "RANK" not in os.environ:
        code = launch(run, list(HydraConfig.get().overrides.task))
        if code:
            raise SystemExit(code)
        return None
    from assembly import run_training

    outcome = run_training(run)
    if outcome.exit_code:
        raise SystemExit(outcome.exit_code)
    return outcome.metric


def main() -> None:
    setup_logging()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors of composition reach us, not Hydra's printer
    leave(exit_code(compose_and_run))


def compose_and_run() -> None:
    sys.argv[1:] = prepare(sys.argv[1:])
    try:
        task()
    except ValueError as error:
        if failures or isinstance(error, UserError):
            raise
        raise UserError(f"cannot compose the configuration: {error}") from error  # no job has begun
    if failures:
        raise failures[0]


def exit_code(job: Callable[[], object]) -> int:
    """Run ``job``; how it ended, in words on stderr and as the process's exit code."""
    try:
        job()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        return 130
    except UserError as error:
        return fail(error, str(error), 2)
    except (HydraException, OmegaConfBaseException) as error:
        return fail(error, composition_problem(error), 2)
    except Exception as error:  # noqa: BLE001 - the last line of defence: told in full, exit code 1
        told = {"PeerLost", "MainFailed", "NonFiniteError"} & {
            type(error).__name__
        }  # what they say is the whole story
        return fail(error, str(error) if told else traceback.format_exc(), 1)
    return 0


def fail(error: BaseException, text: str, code: int) -> int:
    who = f"error: [rank {rank()}] " if rank() else "error: "
    for line in text.splitlines():
        sys.stderr.write(f"{who}{line}\n")
    if "RANK" in os.environ:
        from engine.launch import record_failure

        record_failure(error)
    return code


def leave(code: int) -> NoReturn:
    """End the process. A rank does not tear down: with a peer gone, that may hang or abort."""
    if "RANK" not in os.environ:
        raise SystemExit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
