"""python -m bandits.run +experiment=<name> [key=value ...]: one bandit experiment from settings to figures.

Experiments are ``bandits/config/experiment/*.yaml``. Results go to ``run_root/<experiment>``; the records there are
written anew at every run. Exit code 2 and one message for a mistake in the settings.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import utils
from bandits.report import Report
from config.build import build, load_class
from engine.rundir import provenance, write_facts
from utils import UserError, content_hash

CONFIG_DIR = Path(__file__).resolve().parent / "config"
PREFIX = ("+experiment=", "experiment=")


def experiments() -> list[str]:
    """Names that +experiment= takes."""
    return sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))


def settings(argv: list[str]) -> tuple[str, dict[str, Any]]:
    """(experiment, plain settings) from the command line. Raises UserError."""
    name = next((word.split("=", 1)[1] for word in argv if word.startswith(PREFIX)), None)
    if name is None:
        raise UserError(f"give +experiment=NAME; NAME is one of {', '.join(experiments())}")
    if name not in experiments():
        raise UserError(
            f"+experiment={name}: no such experiment{utils.did_you_mean(name, experiments())}; "
            f"known: {', '.join(experiments())}"
        )
    # every other word is forced, so that an unknown key reaches the dataclass and its "did you mean"
    words = [f"+experiment={name}"]
    words += ["++" + word.lstrip("+") for word in argv if not word.startswith(PREFIX)]
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            plain = OmegaConf.to_container(compose("config", overrides=words), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"cannot read the command line: {str(error).splitlines()[0]}") from error
    known = ("run_root", "num_threads", "study")
    for key in plain:
        if key not in known:
            raise UserError(
                f"unknown key {key}{utils.did_you_mean(key, known)}; keys: run_root, num_threads, study.KEY"
            )
    if not isinstance(plain["num_threads"], int) or plain["num_threads"] < 1:
        raise UserError(f"num_threads={plain['num_threads']}: must be an integer of at least 1")
    return name, plain


def study(plain: dict[str, Any]) -> Any:
    """The study object that the settings describe."""
    cls = load_class(plain["study"]["class"], ("bandits",), "study.class")
    values = {key: value for key, value in plain["study"].items() if key != "class"}
    return build(cls, values, "study.")


def main(argv: list[str]) -> int:
    """Returns the exit code."""
    if {"-h", "--help"} & set(argv):
        print(__doc__, f"Experiments: {', '.join(experiments())}", sep="\n")
        return 0
    utils.setup_logging()
    try:
        name, plain = settings(argv)
        experiment = study(plain)
        torch.set_num_threads(plain["num_threads"])
        report = Report(Path(plain["run_root"]) / name)
        facts = provenance(
            config_hash=content_hash(plain["study"]),
            config_hash_no_seed=content_hash({k: v for k, v in plain["study"].items() if k != "seed"}),
            command=argv,
            seed=experiment.seed,
            root=CONFIG_DIR,
        )
        write_facts(report.folder, plain, facts)
        experiment.run(report)
        report.finish(experiment.claims)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
