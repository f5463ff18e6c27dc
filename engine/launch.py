"""One process per rank on this machine: start them, pass signals on, end together, tell whose failure it was.

``torchrun`` does the same job across machines; it swallows exit codes (1 for everything) and kills a rank that is still
saving 30 s after SIGTERM, which is why a run on one machine does not need it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from utils import log

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torchrun gives each rank such a file too, and prints what is in it
GRACE_S = 30.0  # what the other ranks get to notice that one has failed


def record_failure(error: BaseException) -> None:
    """Leave word of this rank's failure for the launcher, in the form that torchrun reads as well."""
    path = os.environ.get(ERROR_FILE)
    if path is None:
        return
    trace = "".join(traceback.format_exception(error))
    extra = {"py_callstack": trace, "timestamp": str(int(time.time()))}
    message = {"message": f"{type(error).__name__}: {error}", "extraInfo": extra}
    Path(path).write_text(json.dumps({"message": message}), encoding="utf-8")


def run_ranks(command: Sequence[str], num_ranks: int, timeout_s: float) -> int:
    """Run ``command`` as ``num_ranks`` ranks; the exit code of the rank that failed first, 0 if none did.

    Of ranks that fail together the one that did not merely lose a peer counts. SIGTERM and SIGINT go to every rank, and
    what the ranks make of it comes back (143, 130). When one has ended with an error, the others get min(timeout_s,
    GRACE_S) seconds to notice; then they are killed. A rank killed by signal N counts as 128 + N.
    """
    from torch.distributed import TCPStore

    # held here, so that its port is ours before a rank can ask for it, and outlives every rank
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        files = [Path(folder) / f"{rank}.json" for rank in range(num_ranks)]
        ranks: list[subprocess.Popen] = []

        def pass_on(number: int, frame: FrameType | None) -> None:
            for process in ranks:
                if process.poll() is None:
                    process.send_signal(number)

        before = {n: signal.signal(n, pass_on) for n in (signal.SIGTERM, signal.SIGINT)}
        try:
            for rank, path in enumerate(files):
                variables = _environment(rank, num_ranks, store.port) | {ERROR_FILE: str(path)}
                ranks.append(subprocess.Popen(list(command), env=variables))
            ended = _wait(ranks, min(timeout_s, GRACE_S))
        finally:
            for process in ranks:
                if process.poll() is None:
                    process.kill()
                process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)
        return _judge(ended, {rank: _message(path) for rank, path in enumerate(files)})


def _environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    threads = str(max(1, (os.cpu_count() or 1) // num_ranks))
    return {
        "OMP_NUM_THREADS": threads,
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _wait(ranks: Sequence[subprocess.Popen], grace_s: float) -> list[tuple[int, int]]:
    """(rank, exit code) in the order in which they ended; those that had to be killed are left out."""
    ended: dict[int, int] = {}
    deadline = None
    while len(ended) < len(ranks):
        for rank, process in enumerate(ranks):
            code = process.poll()
            if code is not None and rank not in ended:
                ended[rank] = code if code >= 0 else 128 - code
                if code != 0 and deadline is None:
                    deadline = time.monotonic() + grace_s
        if deadline is not None and time.monotonic() > deadline:
            late = [rank for rank in range(len(ranks)) if rank not in ended]
            log.error("rank %s did not end %g s after another failed: killed", late, grace_s)
            break
        time.sleep(0.05)
    return list(ended.items())


def _message(path: Path) -> str | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["message"]["message"]
    except (OSError, ValueError, KeyError):
        return None  # killed before it could tell


def _judge(ended: Sequence[tuple[int, int]], messages: Mapping[int, str | None]) -> int:
    failed = [(rank, code) for rank, code in ended if code != 0]
    if not failed:
        return 0
    victims = ("PeerLost", "MainFailed")
    causes = [f for f in failed if not (messages[f[0]] or "").startswith(victims)] or failed
    rank, code = causes[0]
    if code in (130, 143) and messages[rank] is None:
        return code  # asked to stop, and did
    name = f"killed by {signal.Signals(code - 128).name}" if code > 128 and messages[rank] is None else None
    sys.stderr.write(f"error: rank {rank}: {name or messages[rank] or 'ended'} (exit code {code})\n")
    return code


__all__ = ["record_failure", "run_ranks"]
