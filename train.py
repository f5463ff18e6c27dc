"""Entry: `python train.py key=value ...`. Composes and validates the config, starts the ranks, hands over to assembly.

Exit codes: 0 done, 1 a failure of ours, 2 a mistake the user can mend, 143/130 checkpointed on SIGTERM/SIGINT.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from config.compose import Run, prepare, resolve
from utils import UserError, setup_logging

ROOT = Path(__file__).resolve().parent


def launch(run: Run, overrides: list[str]) -> int:
    """Start one process per device through torch's own launcher; its exit code (torchrun's own where a rank failed)."""
    from engine.parallel import pick_device

    nproc = run.config.trainer.nproc
    if nproc is None:
        import torch

        nproc = torch.cuda.device_count() if pick_device(run.config.device).type == "cuda" else 1
    run.config.check_world(nproc)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    command += [str(ROOT / "train.py"), *overrides]
    child = subprocess.Popen(command)
    try:
        return child.wait()
    except KeyboardInterrupt:
        return child.wait()  # the terminal sent the signal to the ranks as well


failures: list[BaseException] = []  # of jobs; Hydra would print its own story about them


@hydra.main(version_base="1.3", config_path="config", config_name="config")
def task(cfg: DictConfig) -> float | None:
    """One job: the only one, or one of a multirun, whose other jobs go on if it fails."""
    setup_logging()  # again: Hydra has reset logging
    try:
        return job(cfg)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - raised again by main
        failures.append(error)
        return None


def job(cfg: DictConfig) -> float | None:
    """Train; the watched metric, for sweepers."""
    from hydra.core.hydra_config import HydraConfig

    run = resolve(cfg)
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
    try:
        sys.argv[1:] = prepare(sys.argv[1:])
        task()
        if failures:
            raise failures[0]
    except UserError as error:
        fail(error)
    except (HydraException, OmegaConfBaseException) as error:
        fail(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__))


def fail(message: object) -> None:
    for line in str(message).splitlines():
        print(f"error: {line}", file=sys.stderr)
    raise SystemExit(2) from None


if __name__ == "__main__":
    main()
