"""Who may import whom: losses and data stay pure, few files know torch.distributed, Hydra and W&B."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = {".venv", "tests", "runs"}
FILES = {
    path.relative_to(ROOT).as_posix(): path
    for path in sorted(ROOT.rglob("*.py"))
    if path.relative_to(ROOT).parts[0] not in SKIPPED
}
OURS = {name.split("/")[0].removesuffix(".py") for name in FILES}

# what each may import of ours outside itself; None: anything but the entries and the bandits
MAY_IMPORT = {
    "losses": {"data.schema", "utils"},
    "weighting.py": {"utils"},
    "data": {"utils"},
    "engine": {"data.schema", "losses.types", "losses.gpm", "utils"},
    "trainers.py": None,
    "preference_datasets.py": None,
}
ONLY_IN = {
    "torch.distributed": {
        "engine/parallel.py",
        "engine/launch.py",
        "engine/checkpoint.py",
        "engine/sharded.py",
    },
    "wandb": {"engine/metrics.py", "plot_scripts/load.py"},
    "hydra": {"train.py", "bandits/run.py", "config/compose.py"},
    "omegaconf": {"train.py", "bandits/run.py", "config/compose.py"},
    "trl": {"benchmarks/trl_worker.py"},  # a contestant, run by an interpreter that has it
}


def imported(source: str) -> set[str]:
    """Dotted modules of the import statements anywhere in ``source``; of ``from a import b`` both a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def under(module: str, parents: set[str]) -> bool:
    return any(module == parent or module.startswith(parent + ".") for parent in parents)


def strays(layer: str, allowed: set[str] | None) -> list[str]:
    own = layer.removesuffix(".py")
    out = []
    for name in [n for n in FILES if n == layer or n.startswith(layer + "/")]:
        for module in imported(FILES[name].read_text()):
            if module.split(".")[0] not in OURS or under(module, {own}):
                continue
            wrong = under(module, {"train", "bandits"}) if allowed is None else not under(module, allowed)
            # of `from losses import types` the bare package is no module of its own
            if wrong and not (allowed and any(a.startswith(module + ".") for a in allowed)):
                out.append(f"{name}: {module}")
    return sorted(out)


@pytest.mark.parametrize(("layer", "allowed"), MAY_IMPORT.items())
def test_a_layer_imports_only_what_is_below_it(layer, allowed):
    assert strays(layer, allowed) == []


@pytest.mark.parametrize(("module", "files"), ONLY_IN.items())
def test_few_files_know_of(module, files):
    assert {
        n for n, path in FILES.items() if any(under(m, {module}) for m in imported(path.read_text()))
    } == files


def test_nothing_of_the_library_imports_the_bandits():
    users = {n for n, p in FILES.items() if any(under(m, {"bandits"}) for m in imported(p.read_text()))}
    assert {name.split("/")[0] for name in users} <= {"bandits", "plot_scripts"}


def test_an_import_inside_a_function_counts_too():
    assert imported("def f():\n    from torch.distributed import TCPStore") == {
        "torch.distributed",
        "torch.distributed.TCPStore",
    }
    assert strays("engine", {"utils"})
