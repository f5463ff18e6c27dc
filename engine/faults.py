"""Places where a test may kill the process, to prove that nothing there can lose a run."""

from __future__ import annotations

import os
import signal
from collections import Counter

_hits: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """SIGKILL this process at the k-th hit of ``name`` when the environment says ``CRASH_AT=name[:k]`` (k=1).

    Without ``CRASH_AT`` this costs one dictionary look-up. SIGKILL, because it is what the kernel's memory killer
    and a pre-empting scheduler send: no handler, no ``finally``, no flush.
    """
    wanted = os.environ.get("CRASH_AT")
    if wanted is None:
        return
    where, _, hit = wanted.partition(":")
    if where != name:
        return
    _hits[name] += 1
    if _hits[name] == int(hit or 1):
        os.kill(os.getpid(), signal.SIGKILL)
