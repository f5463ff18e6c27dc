"""Memory of training on paper, and the same numbers counted on a small model: `python -m benchmarks.memory_model [--check]`.

Per rank of W, for P parameters (FSDP; W = 1 is one process; under DDP every rank holds what W = 1 holds):

    weights      4 P / W               float32 master weights
    gradients    4 P / W
    optimizer    8 P / W               AdamW's two moments
    reference    r P / W               r bytes a parameter; 0 with a cached or adapter-off reference
    gathered     2 x 2 (largest block) + 2 (embedding and head)      what is whole at one time, in bfloat16
    activations  c tokens (L (A h + B f)) without recomputation; c tokens (L h + A h + B f) with it (c bytes each)

L blocks of width h with f inner units; A = 13, B = 4 for Llama-like blocks with fused attention: the inputs of the norms and
of the linear layers, queries, keys and values before and after rotation, and the four tensors of a gated MLP.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

GB = 1e9
A, B = 13, 4
COUNTS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 128)  # of devices, to choose from


@dataclass(frozen=True)
class Shape:
    name: str
    layers: int
    hidden: int
    inner: int
    vocab: int
    kv: float = 1.0  # key and value width over the hidden width
    tied: bool = False

    @property
    def block(self) -> float:
        """Parameters of one block."""
        return self.hidden**2 * (2 + 2 * self.kv) + 3 * self.hidden * self.inner + 2 * self.hidden

    @property
    def outside(self) -> float:
        return self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> float:
        return self.layers * self.block + self.outside


SHAPES = (
    Shape("2B (Gemma)", 18, 2048, 16384, 256_000, kv=1 / 8, tied=True),
    Shape("7B (Llama)", 32, 4096, 11008, 32_000),
    Shape("13B (Llama)", 40, 5120, 13824, 32_000),
    Shape("70B (Llama)", 80, 8192, 28672, 32_000, kv=1 / 8),
)


def activations(shape: Shape, tokens: int, recompute: bool, size: int) -> float:
    """Bytes kept from the forward to the backward pass of one micro-batch."""
    inside = A * shape.hidden + B * shape.inner
    held = shape.layers * shape.hidden + inside if recompute else shape.layers * inside
    return size * tokens * held


def memory(
    shape: Shape, ranks: int, *, tokens: int = 8192, reference: int = 2, recompute: bool = True
) -> dict[str, float]:
    """Bytes per rank, by what they are for. reference: bytes per parameter of a live reference, 0 for none."""
    p = shape.parameters
    return {
        "weights": 4 * p / ranks,
        "gradients": 4 * p / ranks,
        "optimizer": 8 * p / ranks,
        "reference": reference * p / ranks,
        "gathered": (2 * 2 * shape.block + 2 * shape.outside) if ranks > 1 else 0.0,
        "activations": activations(shape, tokens, recompute, 2),
    }


def table(ranks: int, **settings) -> str:
    columns = list(memory(SHAPES[0], ranks))
    lines = [
        f"| model | {' | '.join(columns)} | sum, GB per rank of {ranks} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for shape in SHAPES:
        found = memory(shape, ranks, **settings)
        cells = " | ".join(f"{found[c] / GB:.1f}" for c in columns)
        lines.append(f"| {shape.name} | {cells} | {sum(found.values()) / GB:.0f} |")
    return "\n".join(lines)


def fits(devices: tuple[int, ...] = (24, 80), free: float = 0.15) -> str:
    """How many devices of so many GB a model needs, with a live and without a resident reference; "(GB per rank)"."""
    lines = [
        f"| model | {' | '.join(f'{d} GB' for d in devices)} | {' | '.join(f'{d} GB, cached reference' for d in devices)} |",
        "|---" * (2 * len(devices) + 1) + "|",
    ]
    for shape in SHAPES:
        cells = []
        for reference in (2, 0):
            for device in devices:
                held = {w: sum(memory(shape, w, reference=reference).values()) / GB for w in COUNTS}
                least = next((w for w in COUNTS if held[w] < (1 - free) * device), None)
                cells.append(f"{least} ({held[least]:.0f})" if least else "no")
        lines.append(f"| {shape.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def check() -> dict[str, tuple[float, float]]:
    """{what: (formula, counted)} in bytes for a small float32 Llama: tensors of the state, and those saved for backward."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = Shape("small", 4, 256, 688, 264, kv=0.5)
    config = LlamaConfig(
        vocab_size=264, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, attn_implementation="sdpa",
    )  # fmt: skip
    found = {}
    for recompute in (False, True):
        model = LlamaForCausalLM(config).train()
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(model.parameters())
        ids = torch.arange(512).remainder(264).view(4, 128)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        held: dict[int, int] = {}

        def pack(t: torch.Tensor, own: set = own, held: dict = held) -> torch.Tensor:
            if (pointer := t.untyped_storage().data_ptr()) not in own:
                held[pointer] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        counted = sum(held.values())
        hidden.square().mean().backward()
        if recompute:  # recomputed block by block: what one block keeps comes on top
            counted += found["activations"][1] / shape.layers
        optimizer.step()
        name = "activations, recomputed" if recompute else "activations"
        found[name] = (activations(shape, ids.numel(), recompute, 4), counted)
    p = shape.parameters
    state = [t for s in optimizer.state.values() for t in s.values() if t.numel() > 1]
    found["weights"] = (4 * p, sum(q.nbytes for q in model.parameters()))
    found["gradients"] = (
        4 * (p - shape.vocab * shape.hidden),
        sum(q.grad.nbytes for q in model.parameters() if q.grad is not None),
    )
    found["optimizer"] = (8 * (p - shape.vocab * shape.hidden), sum(t.nbytes for t in state))
    return found


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory_model", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--check", action="store_true", help="count the same tensors on a small model")
    if parser.parse_args(argv).check:
        for name, (formula, counted) in check().items():
            print(
                f"{name:<26} formula {formula / 1e6:8.2f} MB   counted {counted / 1e6:8.2f} MB   ratio {formula / counted:.2f}"
            )
        return
    for ranks in (1, 4, 8):
        print(table(ranks), end="\n\n")
    print(fits())


if __name__ == "__main__":
    main(sys.argv[1:])
