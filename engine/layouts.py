"""How ragged prompts and responses become rows for a language model. NumPy only: no model, no device.

Two layouts, one contract (`Layout`); every layout gives the same log-probs:

- `padded`: one right-padded row per response, prompt repeated. Works for any causal language model.
- `shared_prefix`: one row without padding. A prompt stands once, followed by its distinct responses as branches; the
  position ids of each branch go on from the prompt's end, and attention (`engine.attention`) lets a token see the prompt
  and its own branch only::

      tokens     p0 p1 p2 | a0 a1 a2 | b0 b1 | q0 q1 | c0 ...
      position    0  1  2 |  3  4  5 |  3  4 |  0  1 |  2 ...

  All examples of a batch with the same prompt ids share it, and equal responses to it are scored once.

A response's last token predicts nothing, so for log-probs it is not fed at all; the prompt's last position predicts the
first token of every branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Branches of a tree are attended in one call while they have at most this many tokens together: below it, the price of a
# call (tens of microseconds) exceeds that of the masked-out corner. Measured on a 2-core CPU.
GROUP_TOKENS = 64


@dataclass(frozen=True)
class Block:
    """Consecutive tokens of a packed row that are attended in one call.

    prompt    index of the block that holds their prompt; None when this block is a prompt
    branches  lengths of the branches in the block, in order; a prompt is one branch
    """

    prompt: int | None
    branches: tuple[int, ...]

    @property
    def size(self) -> int:
        """Tokens of the block."""
        return sum(self.branches)


@dataclass(frozen=True)
class Layout:
    """Rows for the body, and where in them each scored token is predicted. N rows of L positions.

    ids             (N, L) int64
    positions       (N, L) int64 position ids
    attention_mask  (N, L) bool, True where there is a token; None for a packed row
    blocks          attention blocks of a packed row, in row order; empty for padded rows
    longest         tokens of the longest path from a prompt's first token to a response's last fed one
    at              (M,) int64 positions in the flattened rows whose hidden state is needed, each once
    row             (K,) int64 for each scored token of each distinct response: the entry of ``at`` that predicts it
    target          (K,) int64 its token id
    lengths         (U,) int64 tokens of each distinct response (K in total)
    unit            (S,) int64 the distinct response that each response is
    """

    ids: np.ndarray
    positions: np.ndarray
    attention_mask: np.ndarray | None
    blocks: tuple[Block, ...]
    longest: int
    at: np.ndarray
    row: np.ndarray
    target: np.ndarray
    lengths: np.ndarray
    unit: np.ndarray

    @property
    def body_tokens(self) -> int:
        """Positions that go through the model's body, padding included."""
        return self.ids.size


def ragged_arange(lengths: np.ndarray) -> np.ndarray:
    """(sum of lengths,) int64: 0..n-1 for each n of ``lengths`` (U,), one after another."""
    starts = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) - np.repeat(starts, lengths)


def _ids(pieces: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(pieces).astype(np.int64) if pieces else np.zeros(0, np.int64)


def _nothing() -> Layout:
    """No response selected: one token still goes through the body, so that every rank makes the same collective calls."""
    none = np.zeros(0, np.int64)
    one = np.zeros((1, 1), np.int64)
    return Layout(one, one.copy(), np.ones((1, 1), bool), (), 1, none, none, none, none, none)


def padded(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], example: Sequence[int], last: bool
) -> Layout:
    """One right-padded row per response.

    prompts    B arrays of ids, each with at least one token
    responses  S arrays of ids, each with at least one token
    example    S indices into ``prompts``
    last       score the hidden state at the response's last token (reward models), not the response's tokens
    """
    if not responses:
        return _nothing()
    prompt_lengths = np.array([len(prompts[e]) for e in example], np.int64)
    lengths = np.array([len(r) for r in responses], np.int64)
    fed = prompt_lengths + lengths - (not last)
    num_rows, width = len(responses), int(fed.max())
    inside = np.arange(width) < fed[:, None]
    ids = np.zeros((num_rows, width), np.int64)
    pieces = [
        piece
        for e, r in zip(example, responses, strict=True)
        for piece in (prompts[e], r if last else r[:-1])
    ]
    ids[inside] = _ids(pieces)
    positions = np.tile(np.arange(width), (num_rows, 1))
    starts = np.arange(num_rows) * width
    if last:
        at, row, target = starts + fed - 1, np.zeros(0, np.int64), np.zeros(0, np.int64)
    else:
        at = np.repeat(starts + prompt_lengths - 1, lengths) + ragged_arange(lengths)
        row, target = np.arange(len(at)), _ids(responses)
    return Layout(ids, positions, inside, (), width, at, row, target, lengths, np.arange(num_rows))


@dataclass
class _Tree:
    """A distinct prompt and its distinct responses (indices of `units`)."""

    prompt: np.ndarray
    units: list[int]


def _grow(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], example: Sequence[int]
) -> tuple[list[_Tree], list[int], np.ndarray]:
    """Distinct prompts with their distinct responses -> (trees, the first response of each unit, unit of each response).

    Units are numbered in tree order, so a packed row holds them in the order of their numbers.
    """
    trees: dict[bytes, _Tree] = {}
    key_of = [np.ascontiguousarray(p, np.int64).tobytes() for p in prompts]
    first: dict[tuple[bytes, bytes], int] = {}
    same_as = []
    for s, (e, response) in enumerate(zip(example, responses, strict=True)):
        tree = trees.setdefault(key_of[e], _Tree(prompts[e], []))
        key = (key_of[e], np.ascontiguousarray(response, np.int64).tobytes())
        if key not in first:
            first[key] = s
            tree.units.append(s)
        same_as.append(first[key])
    order = [s for tree in trees.values() for s in tree.units]
    number = {s: u for u, s in enumerate(order)}
    for tree in trees.values():
        tree.units = [number[s] for s in tree.units]
    return list(trees.values()), order, np.array([number[s] for s in same_as], np.int64)


def _group(sizes: Sequence[int], prompt: int) -> list[Block]:
    """Branches of one tree -> blocks: short neighbours together, branches without a token dropped."""
    groups: list[list[int]] = []
    for size in sizes:
        if size == 0:
            continue
        if groups and sum(groups[-1]) + size <= GROUP_TOKENS:
            groups[-1].append(size)
        else:
            groups.append([size])
    return [Block(prompt, tuple(group)) for group in groups]


def shared_prefix(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], example: Sequence[int], last: bool
) -> Layout:
    """One packed row of trees: every distinct prompt once, its distinct responses as branches. Arguments as `padded`."""
    if not responses:
        return _nothing()
    trees, order, unit = _grow(prompts, responses, example)
    lengths = np.array([len(responses[s]) for s in order], np.int64)
    fed = lengths if last else lengths - 1
    pieces: list[np.ndarray] = []
    blocks: list[Block] = []
    branch_start = np.zeros(len(order), np.int64)  # where each branch's tokens begin in the row
    prompt_end = np.zeros(len(order), np.int64)  # where its prompt's last token is
    prompt_length = np.zeros(len(order), np.int64)
    offset = 0
    for tree in trees:
        u = np.array(tree.units)
        offset += len(tree.prompt)
        prompt_end[u], prompt_length[u] = offset - 1, len(tree.prompt)
        branch_start[u] = offset + np.cumsum(fed[u]) - fed[u]
        offset += int(fed[u].sum())
        pieces.append(tree.prompt)
        pieces += [responses[order[i]] if last else responses[order[i]][:-1] for i in tree.units]
        prompt_block = len(blocks)
        blocks.append(Block(None, (len(tree.prompt),)))
        blocks += _group([int(n) for n in fed[u]], prompt_block)
    ids = _ids(pieces)
    positions = ragged_arange(np.array([len(p) for p in pieces], np.int64))
    in_branch = np.repeat(branch_start, fed) + ragged_arange(fed)
    positions[in_branch] += np.repeat(prompt_length, fed)
    longest = int((prompt_length + fed).max())
    if last:
        at, row, target = branch_start + fed - 1, np.zeros(0, np.int64), np.zeros(0, np.int64)
    else:
        step = ragged_arange(lengths)
        source = np.where(
            step == 0, np.repeat(prompt_end, lengths), np.repeat(branch_start, lengths) + step - 1
        )
        at, row = np.unique(source, return_inverse=True)
        target = _ids([responses[s] for s in order])
    return Layout(ids[None], positions[None], None, tuple(blocks), longest, at, row, target, lengths, unit)
