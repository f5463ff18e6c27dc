"""torch.compile of transformer blocks (``compile=true``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import AttentionInterface

from engine import attention
from engine.parallel import block_classes


def compile_blocks(model: nn.Module, block_name: str | None = None) -> None:
    """Compile each block in place, once for all lengths; parameters keep their names. Before sharding.

    Not the last block: its MLP runs under hooks that come and go (`engine.scoring`), which compiled code would not see.
    Attention over trees stays outside of the graphs, because the lengths of its blocks are Python numbers: there would be a
    graph for each. block_name: as in ``engine.parallel.block_classes``.
    """
    AttentionInterface.register(attention.NAME, torch.compiler.disable(attention.tree_attention))
    names = block_classes(model, block_name)
    for block in [m for m in model.modules() if type(m).__name__ in names][:-1]:
        block.compile(dynamic=True)


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run compiled blocks as they were written: for generation, whose caches would have them compiled again and again."""
    if all(module._compiled_call_impl is None for module in model.modules()):
        yield
    else:
        with torch.compiler.set_stance("force_eager"):
            yield
