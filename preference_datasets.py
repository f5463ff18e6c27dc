"""Example -> tokens -> Row -> Batch: prompt and response as ids whose boundary, BOS and EOS are exact by construction.

The one place where text becomes tokens: training, evaluation, reference caches and generation all use these ids.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.passport import Counts, is_identical, passport
from data.plan import Plan, micro_batches
from data.schema import Batch, Example, Row, Text
from data.split import prompt_key
from data.token_cache import TokenCache
from engine.codec import Codec
from utils import UserError, did_you_mean, file_hash, log

__all__ = [
    "Counts",
    "Plan",
    "Prompt",
    "Tokenization",
    "get_batch_iterator",
    "get_dataset",
    "micro_batches",
    "passport",
    "render_prompts",
    "sft_examples",
    "tokenize",
]

# what tokenises and what stores: rows that other code made are not read
CODE = [Path(__file__), Path(inspect.getfile(Codec)), Path(inspect.getfile(TokenCache))]
CHUNK = 2048  # examples tokenised at a time: bounds the memory of the library's encodings


@dataclass(frozen=True)
class Tokenization:
    """How text becomes ids.

    bos                "auto": the tokenizer's own rule, exactly once; "always"; "never" (the original DPO code)
    mode               "separate": prompt and response are encoded by themselves and their ids joined, so that the
                       boundary is exact. "joint": encoded together, the response is what follows the prompt's ids; for
                       SentencePiece tokenizers, which would put a dummy space before a response encoded by itself.
                       Where a token crosses the boundary the example is encoded separately, and counted.
    max_length         tokens of prompt + longest response of an example
    max_prompt_length  tokens, BOS included, to which the prompt is cut when that is exceeded
    truncation         which end of a cut prompt is kept: "keep_start" | "keep_end"; or "drop" the row, or "error"
    """

    bos: Literal["auto", "always", "never"] = "auto"
    mode: Literal["separate", "joint"] = "separate"
    max_length: int = 512
    max_prompt_length: int = 256
    truncation: Literal["keep_start", "keep_end", "drop", "error"] = "keep_start"

    def __post_init__(self) -> None:
        for key, value, known in (
            ("data.bos", self.bos, ("auto", "always", "never")),
            ("data.tokenize", self.mode, ("separate", "joint")),
            ("truncation", self.truncation, ("keep_start", "keep_end", "drop", "error")),
        ):
            if value not in known:
                raise UserError(
                    f"{key}={value}: must be one of {', '.join(known)}{did_you_mean(str(value), known)}"
                )
        if not 1 <= self.max_prompt_length < self.max_length:
            raise UserError(
                f"max_prompt_length={self.max_prompt_length}: must be at least 1 and below max_length={self.max_length}, "
                "so that a cut prompt leaves room for a response"
            )


# ---------------------------------------------------------------------------------------------- examples -> rows


@dataclass(frozen=True)
class _Draft:
    """An example as rendered text: its prompt, and of the wanted responses the text without EOS."""

    example: Example
    prompt: str
    kept: tuple[int, ...]  # positions of the wanted responses among the example's
    bodies: tuple[str, ...]
    finished: tuple[bool, ...]  # whether the response ends with EOS


@dataclass(frozen=True)
class _Encoded:
    """A draft as ids: BOS (or nothing), the prompt, the responses with their EOS."""

    example: Example
    kept: tuple[int, ...]
    finished: tuple[bool, ...]
    head: list[int]
    prompt: list[int]
    responses: list[list[int]]


def _draft(example: Example, codec: Codec, roles: Sequence[str] | None) -> _Draft:
    flags = example.response_scalars.get("finished", ())
    kept = tuple(i for i, (role, _) in enumerate(example.responses) if roles is None or role in roles)
    finished = tuple(not flags or flags[i] != 0.0 for i in kept)  # NaN: not known to be cut
    wanted = [example.responses[i][1] for i in kept]
    if isinstance(example.prompt, str):
        if any(not isinstance(text, str) for text in wanted):
            raise UserError(
                f"{example.uid}: the prompt is text but a response is messages; make both the same"
            )
        prompt = codec.check(example.uid, example.prompt)
        return _Draft(
            example, prompt, kept, tuple(codec.check(example.uid, text) for text in wanted), finished
        )
    prompt = codec.render(example.uid, example.prompt, True)
    chats = [({"role": "assistant", "content": text},) if isinstance(text, str) else text for text in wanted]
    bodies = [
        codec.chat_response(example.uid, prompt, example.prompt, chat, done)
        for chat, done in zip(chats, finished, strict=True)
    ]
    return _Draft(example, prompt, kept, tuple(bodies), finished)


def _response_ids(
    drafts: Sequence[_Draft], prompts: Mapping[str, list[int]], codec: Codec, mode: str, counts: Counts
) -> list[list[list[int]]]:
    """Per draft, the ids of its responses without EOS."""
    if mode == "separate":
        ids = codec.encode([body for draft in drafts for body in draft.bodies])
        return [[ids[body] for body in draft.bodies] for draft in drafts]
    joined = codec.encode([draft.prompt + body for draft in drafts for body in draft.bodies])
    found = []
    for draft in drafts:
        prompt = prompts[draft.prompt]
        whole = [joined[draft.prompt + body] for body in draft.bodies]
        if all(ids[: len(prompt)] == prompt for ids in whole):
            found.append([ids[len(prompt) :] for ids in whole])
        else:  # all of the example's responses alike, or a pair would differ by more than its text
            counts.add("crossing", draft.example.group)
            alone = codec.encode(draft.bodies)
            found.append([alone[body] for body in draft.bodies])
    return found


def _encode(
    examples: Sequence[Example], codec: Codec, mode: str, roles: Sequence[str] | None, counts: Counts
) -> Iterator[_Encoded]:
    """Examples as ids, in order; the fast tokenizer works on a chunk of them at a time."""
    for start in range(0, len(examples), CHUNK):
        drafts = [_draft(example, codec, roles) for example in examples[start : start + CHUNK]]
        prompts = codec.encode([draft.prompt for draft in drafts])
        for draft, bodies in zip(drafts, _response_ids(drafts, prompts, codec, mode, counts), strict=True):
            uid = draft.example.uid
            head, prompt = codec.split_head(prompts[draft.prompt])
            if not head and not prompt:
                raise UserError(
                    f"{uid}: the prompt is empty and tokenizer {codec.label} adds no BOS, so nothing predicts the "
                    "response's first token; give the row a prompt, or set data.bos=always if there is a BOS token"
                )
            responses = [
                [*ids, codec.eos] if done else ids for ids, done in zip(bodies, draft.finished, strict=True)
            ]
            if not all(responses):
                raise UserError(f"{uid}: a response marked unfinished (finished=0) has no tokens; remove it")
            yield _Encoded(draft.example, draft.kept, draft.finished, head, prompt, responses)


def cut_prompt(head: list[int], prompt: list[int], longest: int, settings: Tokenization) -> list[int]:
    """BOS and the prompt, cut to ``max_prompt_length`` if it and ``longest`` response tokens exceed ``max_length``.

    BOS stays whichever end is kept. The rule of the DPO family: a prompt is not touched while everything fits.
    """
    room = max(settings.max_prompt_length - len(head), 0)
    if len(head) + len(prompt) + longest <= settings.max_length or len(prompt) <= room:
        return head + prompt
    return head + (prompt[:room] if settings.truncation == "keep_start" else prompt[len(prompt) - room :])


def cut_response(response: list[int], finished: bool, room: int) -> list[int]:
    """The response's first ``room`` tokens; if it was finished its EOS takes the last place."""
    if len(response) <= room:
        return response
    return response[: room - 1] + response[-1:] if finished else response[:room]


def _too_long(one: _Encoded, settings: Tokenization, longest: int) -> bool:
    """Whether the row is to be dropped; raises where the settings say so."""
    size = len(one.head) + len(one.prompt)
    if size + longest <= settings.max_length or settings.truncation in ("keep_start", "keep_end"):
        return False
    if settings.truncation == "error":
        raise UserError(
            f"{one.example.uid}: prompt of {size} and response of {longest} tokens exceed "
            f"max_length={settings.max_length}; raise it, or set truncation=keep_start|keep_end|drop"
        )
    return True


def _check_roles(example: Example, roles: Sequence[str], optional: Sequence[str]) -> None:
    have = [role for role, _ in example.responses]
    for role in roles:
        if role not in optional and have.count(role) != 1:
            raise UserError(
                f"{example.uid}: has {have.count(role)} responses {role!r}, but this loss needs exactly one; it has {have}"
            )
    for name, values in example.response_scalars.items():
        if len(values) != len(have):
            raise UserError(f"{example.uid}: {name} has {len(values)} values for {len(have)} responses")


def _is_blank(text: Text) -> bool:
    return not (text if isinstance(text, str) else text[-1]["content"] if text else "").strip()


def _array(ids: Sequence[int]) -> np.ndarray:
    array = np.array(ids, dtype=np.int32)
    array.flags.writeable = False  # shared by all rows of a prompt
    return array


def _prompt_key(ids: np.ndarray) -> str:
    return hashlib.blake2b(ids.astype("<i4", copy=False).tobytes(), digest_size=16).hexdigest()


def tokenize(
    examples: Sequence[Example],
    tokenizer: Any,
    settings: Tokenization,
    *,
    groups: Sequence[str],
    roles: Sequence[str] | None = None,
    optional_roles: Sequence[str] = (),
    counts: Counts | None = None,
    cache: TokenCache | None = None,
) -> list[Row]:
    """Rows of the examples, in order; whatever is cut or dropped is added to ``counts``.

    groups           names; a row's group is an index into them
    roles            responses to keep (None: all). Every example must have exactly one of each, but for those in
                     ``optional_roles``, of which it may have none or several
    counts           added to, and left for the caller to log; without it the counts are logged here
    cache            where rows are looked for first, and put; None: they are made

    Special-token text in a prompt or response stays text. A response whose ``finished`` scalar is 0 (cut while it was
    generated) gets no EOS. Examples with a blank "target" are dropped: there is nothing to imitate.

    Raises UserError naming the uid: no token to predict from, lone surrogates, a missing role, an unknown group, a
    chat template without an exact boundary, and over-long rows with truncation=error.
    """
    codec = Codec(tokenizer, settings.bos)

    def make() -> tuple[list[Row], Counts]:
        return _make_rows(examples, codec, settings, groups, roles, optional_roles)

    if cache is None:
        rows, tally = make()
    else:
        facts = {
            "tokenizer": codec.identity,
            "settings": asdict(settings),
            "groups": groups,
            "roles": roles,
            "optional": optional_roles,
            "code": [file_hash(path) for path in CODE],
        }
        rows, tally = cache.get(examples, facts, make)
    if counts is None:
        tally.log()
    else:
        counts.update(tally)
    return rows


def _make_rows(
    examples: Sequence[Example],
    codec: Codec,
    settings: Tokenization,
    groups: Sequence[str],
    roles: Sequence[str] | None,
    optional_roles: Sequence[str],
) -> tuple[list[Row], Counts]:
    """See `tokenize`."""
    index = {name: i for i, name in enumerate(groups)}
    tally = Counts()
    prompts: dict[str, np.ndarray] = {}
    rows = []
    usable = []
    for example in examples:
        tally.add("examples", example.group)
        if example.group not in index:
            raise UserError(
                f"{example.uid}: unknown group {example.group!r}{did_you_mean(example.group, groups)}"
            )
        _check_roles(example, roles or (), optional_roles)
        wanted = [(role, text) for role, text in example.responses if roles is None or role in roles]
        if any(role == "target" and _is_blank(text) for role, text in wanted):
            tally.add("blank_targets", example.group)
            continue
        tally.add(
            "quoted",
            example.group,
            any(map(codec.quotes_special, (example.prompt, *(text for _, text in wanted)))),
        )
        usable.append(example)
    for one in _encode(usable, codec, settings.mode, roles, tally):
        longest = max(map(len, one.responses), default=0)
        group = one.example.group
        if _too_long(one, settings, longest):
            tally.add("dropped", group)
            continue
        prompt = _array(cut_prompt(one.head, one.prompt, longest, settings))
        key = _prompt_key(prompt)
        room = settings.max_length - len(prompt)
        cut = [cut_response(ids, done, room) for ids, done in zip(one.responses, one.finished, strict=True)]
        row = Row(
            uid=one.example.uid,
            prompt=prompts.setdefault(key, prompt),
            responses=tuple(map(_array, cut)),
            roles=tuple(one.example.responses[i][0] for i in one.kept),
            group=index[group],
            prompt_key=key,
            weight=float(one.example.weight),
            scalars={name: float(value) for name, value in one.example.scalars.items()},
            response_scalars={
                name: tuple(float(values[i]) for i in one.kept)
                for name, values in one.example.response_scalars.items()
            },
        )
        rows.append(row)
        tally.add("rows", group)
        tally.add("prompts_cut", group, len(prompt) < len(one.head) + len(one.prompt))
        tally.add(
            "responses_cut", group, sum(len(a) < len(b) for a, b in zip(cut, one.responses, strict=True))
        )
        tally.add("empty", group, sum(_is_blank(one.example.responses[i][1]) for i in one.kept))
        tally.add("unfinished", group, one.finished.count(False))
        tally.add("identical", group, is_identical(row))
    return rows, tally


# ---------------------------------------------------------------------------------------------- what uses rows


@dataclass(frozen=True)
class Prompt:
    """A prompt to generate for: (P,) ids, their key, the first example's uid, and the indices of all its examples."""

    key: str
    ids: np.ndarray
    uid: str
    examples: tuple[int, ...]


def render_prompts(
    examples: Sequence[Example], tokenizer: Any, settings: Tokenization, *, max_new_tokens: int = 0
) -> list[Prompt]:
    """The distinct prompts of the examples, in order, with the very ids that training uses.

    A prompt is cut as if the example had one more response, of ``max_new_tokens``; with ``truncation=drop`` over-long
    ones are left out, and logged.
    """
    codec = Codec(tokenizer, settings.bos)
    found: dict[str, Prompt] = {}
    dropped = 0
    for i, one in enumerate(_encode(examples, codec, settings.mode, None, Counts())):
        longest = max([max_new_tokens, *map(len, one.responses)])
        if _too_long(one, settings, longest):
            dropped += 1
            continue
        ids = _array(cut_prompt(one.head, one.prompt, longest, settings))
        key = _prompt_key(ids)
        known = found.setdefault(key, Prompt(key, ids, one.example.uid, ()))
        found[key] = replace(known, examples=(*known.examples, i))
    if dropped:
        log.info(
            "prompts: %d of %d examples left out, longer than max_length (truncation=drop)",
            dropped,
            len(examples),
        )
    return list(found.values())


def sft_examples(examples: Sequence[Example], sft_on: Literal["chosen", "all"]) -> list[Example]:
    """Examples with one response, role "target", to imitate.

    "chosen": one per prompt and group: of the last of its pairs the explicit target if there is one, else the chosen.
    "all": one per chosen and per rejected response of every pair (explicit targets of pairs are left out), so that the
    model learns the law of the labelled responses, which variance-reduced losses need of their reference.
    Completions, which are no pairs, are kept as they are.
    """
    if sft_on not in ("chosen", "all"):
        raise UserError(f"loss.sft_on={sft_on}: must be chosen or all")

    def only(example: Example, position: int, uid: str) -> Example:
        scalars = {name: (values[position],) for name, values in example.response_scalars.items()}
        target = (("target", example.responses[position][1]),)
        return replace(example, uid=uid, responses=target, scalars={}, response_scalars=scalars)

    made: dict[tuple, Example] = {}
    for example in examples:
        roles = [role for role, _ in example.responses]
        if "target" not in roles and "chosen" not in roles:
            raise UserError(
                f"{example.uid}: has neither a target nor a chosen response to imitate; it has {roles}"
            )
        if sft_on == "all" and "chosen" in roles:
            for i in (i for i, role in enumerate(roles) if role in ("chosen", "rejected")):
                made[len(made),] = only(example, i, f"{example.uid}/{roles[i]}")
            continue
        # the pairs of a prompt stand together, but those of its groups may alternate
        key = (prompt_key(example.prompt), example.group) if "chosen" in roles else (len(made),)
        made[key] = only(example, roles.index("target" if "target" in roles else "chosen"), example.uid)
    return list(made.values())


def get_dataset(name: str, settings: Any, seed: int = 0) -> dict[str, list[Example]]:
    """Examples by split of the data set whose module made ``settings`` (``data.hh.Settings(...)``, for example)."""
    return importlib.import_module(type(settings).__module__).load(name, settings, seed)


def get_batch_iterator(
    rows: Sequence[Row], plan: Plan, first_step: int = 0
) -> Iterator[tuple[np.ndarray, Batch]]:
    """(row indices, Batch) of every optimizer step from ``first_step`` on."""
    for step in range(first_step, plan.num_steps):
        indices = plan.step_rows(step)
        yield indices, Batch.collate([rows[i] for i in indices])
