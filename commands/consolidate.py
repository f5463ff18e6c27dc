"""Make an ordinary Hugging Face model of a sharded checkpoint (checkpoint.format=sharded), a few files at a time.

    python -m commands.consolidate RUN/LATEST [RUN/step-N ...]

It is written to RUN/model-step-N, where model.archive=RUN/step-N then finds it. The last checkpoint of a run is treated so
when the run ends.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from engine import checkpoint, sharded
from engine.parallel import World
from plot_scripts.sources import run
from utils import UserError

ALONE = World(0, 1, torch.device("cpu"), "none")


def main(words: Sequence[str]) -> list[Path]:
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return []
    if not words:
        raise UserError("no checkpoint named: give RUN/LATEST or RUN/step-N")
    try:
        return [sharded.consolidate(checkpoint.open_checkpoint(Path(word)), ALONE) for word in words]
    except checkpoint.CheckpointError as error:
        raise UserError(str(error)) from error


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
