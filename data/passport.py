"""The data passport: what is in the tokenised data, and what looks wrong with it, before any model is loaded."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from data.schema import Row
from utils import content_hash, log

# kind -> what happened, as the log says it; kinds in the second table are defects and become findings
KINDS = {
    "examples": "examples read",
    "repeated": "pairs left out: another one gives the prompt's target (loss.sft_on=chosen)",
    "rows": "rows kept",
    "quoted": "examples that quote a special token: kept as plain text",
    "unfinished": "responses cut while they were generated: no EOS added",
    "crossing": "examples encoded separately: a token crosses the prompt's end",
    "identical": "pairs whose chosen and rejected are equal",
    "prompts_cut": "prompts cut to max_prompt_length",
    "responses_cut": "responses cut to fit max_length (EOS kept)",
    "dropped": "rows dropped, longer than max_length (truncation=drop)",
    "empty": "responses without text: EOS (and any white space) is scored",
    "blank_targets": "rows dropped, the target has no text",
}
DEFECTS = ("prompts_cut", "responses_cut", "dropped", "empty", "blank_targets")

# Chosen longer (or shorter) in this share of the pairs of unequal length counts as a length bias, if it is no accident
LENGTH_BIAS, LENGTH_BIAS_SIGMAS = 0.65, 4.0
DUMPED, DUMPED_TOKENS = 8, 48  # rows of the first batch that are shown, tokens of a text


@dataclass
class Counts:
    """How often what happened to which group while the data were tokenised; ``examples`` = kept + dropped."""

    table: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, kind: str, group: str, times: int = 1) -> None:
        assert kind in KINDS, kind
        if times:
            self.table[kind, group] += int(times)

    def update(self, other: Counts) -> None:
        self.table.update(other.table)

    def by_group(self, kind: str) -> dict[str, int]:
        """Group -> count, groups with none left out."""
        return {group: count for (k, group), count in self.table.items() if k == kind}

    def total(self, kind: str) -> int:
        return sum(self.by_group(kind).values())

    def to_dict(self) -> dict[str, dict[str, int]]:
        """kind -> group -> count, for the kinds that happened."""
        return {kind: found for kind in KINDS if (found := self.by_group(kind))}

    def lines(self) -> list[str]:
        """One line per kind that happened."""
        return [
            f"{KINDS[kind]}: {sum(found.values())} ({', '.join(f'{group} {n}' for group, n in found.items())})"
            for kind, found in self.to_dict().items()
        ]

    def log(self) -> None:
        for line in self.lines():
            log.info("data: %s", line)


@dataclass(frozen=True)
class Finding:
    """Something that looks wrong: a code for programs, a sentence for people, how often, and the first few uids."""

    code: str
    message: str
    count: int
    uids: tuple[str, ...] = ()


@dataclass(frozen=True)
class Passport:
    """Numbers by split and group, the findings, and a dump of the first batch.

    splits    split -> group -> {"rows", "prompts", "pairs", "prompt_tokens", "response_tokens", "chosen_longer"}
    tokens    split -> tokens of one pass, a prompt counted once per row
    batch     the rows dumped, with the tokenizer that can read them
    """

    groups: tuple[str, ...]
    splits: Mapping[str, Mapping[str, Mapping[str, Any]]]
    tokens: Mapping[str, int]
    counts: Counts
    findings: tuple[Finding, ...]
    batch: tuple[Row, ...]
    tokenizer: Any

    def to_dict(self) -> dict[str, Any]:
        """What is written as JSON, with a hash of the rest."""
        content = {
            "groups": list(self.groups),
            "splits": self.splits,
            "tokens": dict(self.tokens),
            "counts": self.counts.to_dict(),
            "findings": [{**asdict(finding), "uids": list(finding.uids)} for finding in self.findings],
        }
        return {**content, "hash": content_hash(content)}

    def summary(self) -> str:
        """One line: sizes and the codes found."""
        sizes = ", ".join(
            f"{split} {sum(g['rows'] for g in of.values())}" for split, of in self.splits.items()
        )
        codes = ", ".join(f"{finding.code} ({finding.count})" for finding in self.findings)
        return f"data: {sizes} rows in {len(self.groups)} groups; findings: {codes or 'none'}"

    def render(self, color: bool = False) -> str:
        """The passport for people; ``color`` with ANSI codes, for a terminal."""
        lines = [self.summary(), ""]
        for split, of in self.splits.items():
            lines += [f"{split}: {self.tokens[split]} tokens a pass", *_table(of), ""]
        lines += ["what happened while tokenising:", *(f"  {line}" for line in self.counts.lines()), ""]
        lines += ["findings:" if self.findings else "findings: none"]
        for finding in self.findings:
            where = f"; first: {', '.join(finding.uids)}" if finding.uids else ""
            lines.append(_paint(f"  {finding.code}: {finding.message}{where}", "33", color))
        if self.batch:
            head = f"first batch, {len(self.batch)} rows (scored tokens are the responses'):"
            lines += ["", head, dump(self.batch[:DUMPED], self.tokenizer, self.groups, color)]
            if len(self.batch) > DUMPED:
                lines.append(f"and {len(self.batch) - DUMPED} rows more")
        return "\n".join(lines)


def passport(
    splits: Mapping[str, Sequence[Row]],
    counts: Counts,
    groups: Sequence[str],
    tokenizer: Any,
    *,
    first_batch: Sequence[Row] = (),
) -> Passport:
    """Audit the tokenised rows of all splits.

    Findings: identical_pairs, shared_prompts_splits, shared_prompts_groups, conflicting_labels (with the noise rate they
    imply), length_bias, double_bos, missing_eos, double_eos, group_without_training_rows, group_without_evaluation_rows,
    and one per kind of cut or dropped row in ``counts``.
    """
    numbers = {
        split: {groups[g]: _numbers(own) for g, own in sorted(_by(rows, lambda row: row.group).items())}
        for split, rows in splits.items()
    }
    everything = [row for rows in splits.values() for row in rows]
    findings = [
        _identical(everything),
        _shared(
            ((split, row) for split, rows in splits.items() for row in rows),
            "shared_prompts_splits",
            "splits",
        ),
        _shared(((groups[row.group], row) for row in everything), "shared_prompts_groups", "groups"),
        _conflicts(everything),
        *_special_tokens(everything, tokenizer),
        *(_length_bias(split, group, of) for split, own in numbers.items() for group, of in own.items()),
        _untrained(numbers),
        _unmeasured(numbers),
        *(
            Finding(
                kind, f"{KINDS[kind]}: {counts.total(kind)} of {counts.total('examples')}", counts.total(kind)
            )
            for kind in DEFECTS
            if counts.total(kind)
        ),
    ]
    return Passport(
        groups=tuple(groups),
        splits=numbers,
        tokens={split: sum(row.num_tokens for row in rows) for split, rows in splits.items()},
        counts=counts,
        findings=tuple(finding for finding in findings if finding),
        batch=tuple(first_batch),
        tokenizer=tokenizer,
    )


# ---------------------------------------------------------------------------------------------- numbers


def _by(rows: Iterable[Row], key: Any) -> dict[Any, list[Row]]:
    parts: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        parts[key(row)].append(row)
    return parts


def _pair(row: Row) -> tuple[np.ndarray, np.ndarray] | None:
    """(chosen, rejected) of a row that has both."""
    if "chosen" not in row.roles or "rejected" not in row.roles:
        return None
    return row.responses[row.roles.index("chosen")], row.responses[row.roles.index("rejected")]


def is_identical(row: Row) -> bool:
    """Whether chosen and rejected are the same tokens: a pair that teaches nothing."""
    pair = _pair(row)
    return pair is not None and np.array_equal(*pair)


def _percentiles(lengths: Sequence[int]) -> dict[str, int]:
    if not lengths:
        return {}
    at = np.percentile(lengths, (5, 50, 95, 100), method="nearest")
    return {name: int(value) for name, value in zip(("p5", "p50", "p95", "max"), at, strict=True)}


def _numbers(rows: Sequence[Row]) -> dict[str, Any]:
    pairs = [pair for row in rows if (pair := _pair(row))]
    longer = sum(len(chosen) > len(rejected) for chosen, rejected in pairs)
    shorter = sum(len(chosen) < len(rejected) for chosen, rejected in pairs)
    return {
        "rows": len(rows),
        "prompts": len({row.prompt_key for row in rows}),
        "pairs": len(pairs),
        "prompt_tokens": _percentiles([len(row.prompt) for row in rows]),
        "response_tokens": _percentiles([len(ids) for row in rows for ids in row.responses]),
        "chosen_longer": longer,
        "chosen_shorter": shorter,
        "length_correlation": _correlation(pairs),
    }


def _correlation(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float | None:
    """Of being chosen with the response's length in tokens, over both responses of all pairs; None if undefined."""
    lengths = np.array([(len(chosen), len(rejected)) for chosen, rejected in pairs], dtype=np.float64).ravel()
    if len(lengths) < 4 or lengths.std() == 0:
        return None
    label = np.tile([1.0, 0.0], len(pairs))
    return round(float(np.corrcoef(lengths, label)[0, 1]), 4)


# ---------------------------------------------------------------------------------------------- findings


def _finding(code: str, message: str, rows: Sequence[Row]) -> Finding | None:
    return Finding(code, message, len(rows), tuple(row.uid for row in rows[:3])) if rows else None


def _identical(rows: Sequence[Row]) -> Finding | None:
    same = [row for row in rows if is_identical(row)]
    return _finding("identical_pairs", f"{len(same)} pairs have equal responses and teach nothing", same)


def _shared(labelled: Iterable[tuple[str, Row]], code: str, what: str) -> Finding | None:
    """Prompts that occur under more than one label."""
    labels: dict[str, set[str]] = defaultdict(set)
    first: dict[str, Row] = {}
    for label, row in labelled:
        labels[row.prompt_key].add(label)
        first.setdefault(row.prompt_key, row)
    shared = [first[key] for key, found in labels.items() if len(found) > 1]
    where = sorted({label for row in shared for label in labels[row.prompt_key]})
    return _finding(code, f"{len(shared)} prompts are in several {what} ({', '.join(where)})", shared)


def _conflicts(rows: Sequence[Row]) -> Finding | None:
    """The same two responses to the same prompt, preferred both ways.

    If every label is wrong with probability e, two labels of one comparison disagree with probability d = 2 e (1 - e),
    so e = (1 - sqrt(1 - 2 d)) / 2 (0.5 where d >= 1/2).
    """
    votes: dict[tuple[str, bytes, bytes], list[int]] = defaultdict(lambda: [0, 0])
    named: dict[tuple[str, bytes, bytes], Row] = {}
    for row in rows:
        pair = _pair(row)
        if pair is None or is_identical(row):
            continue
        chosen, rejected = pair[0].tobytes(), pair[1].tobytes()
        key = (row.prompt_key, *sorted((chosen, rejected)))
        votes[key][chosen > rejected] += 1
        named.setdefault(key, row)
    conflicting = [named[key] for key, (a, b) in votes.items() if a and b]
    couples = sum((a + b) * (a + b - 1) / 2 for a, b in votes.values())
    disagree = sum(a * b for a, b in votes.values()) / couples if couples else 0.0
    noise = (1 - np.sqrt(max(0.0, 1 - 2 * disagree))) / 2
    message = (
        f"{len(conflicting)} comparisons are labelled both ways; of repeated labels {disagree:.1%} disagree, "
        f"which implies that {noise:.1%} of the labels are wrong"
    )
    return _finding("conflicting_labels", message, conflicting)


def _special_tokens(rows: Sequence[Row], tokenizer: Any) -> list[Finding | None]:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id

    def is_cut(row: Row, i: int) -> bool:
        return "finished" in row.response_scalars and row.response_scalars["finished"][i] == 0.0

    doubled = [row for row in rows if len(row.prompt) > 1 and row.prompt[0] == row.prompt[1] == bos]
    missing = [
        row
        for row in rows
        if any(ids[-1] != eos and not is_cut(row, i) for i, ids in enumerate(row.responses))
    ]
    twice = [row for row in rows if any(len(ids) > 1 and ids[-1] == ids[-2] == eos for ids in row.responses)]
    return [
        _finding("double_bos", f"{len(doubled)} prompts begin with two BOS tokens", doubled),
        _finding("missing_eos", f"{len(missing)} rows have a finished response without EOS", missing),
        _finding("double_eos", f"{len(twice)} rows have a response that ends with two EOS tokens", twice),
    ]


def _length_bias(split: str, group: str, of: Mapping[str, Any]) -> Finding | None:
    longer, unequal = of["chosen_longer"], of["chosen_longer"] + of["chosen_shorter"]
    if not unequal:
        return None
    share = longer / unequal
    sigmas = abs(2 * longer - unequal) / np.sqrt(unequal)  # of a fair coin
    if max(share, 1 - share) < LENGTH_BIAS or sigmas < LENGTH_BIAS_SIGMAS:
        return None
    return Finding(
        "length_bias",
        f"{split}/{group}: chosen is the longer response in {share:.0%} of {unequal} pairs of unequal length",
        unequal,
    )


def _untrained(numbers: Mapping[str, Mapping[str, Any]]) -> Finding | None:
    if "train" not in numbers:
        return None
    missing = sorted({group for own in numbers.values() for group in own} - set(numbers["train"]))
    if not missing:
        return None
    return Finding(
        "group_without_training_rows", f"evaluated, but never trained on: {', '.join(missing)}", len(missing)
    )


def _unmeasured(numbers: Mapping[str, Mapping[str, Any]]) -> Finding | None:
    trained = set(numbers.get("train", ()))
    missing = [
        f"{split}/{group}" for split, own in numbers.items() if own for group in sorted(trained - set(own))
    ]
    if not missing:
        return None
    return Finding(
        "group_without_evaluation_rows",
        f"trained on, but without a row in {', '.join(missing)}",
        len(missing),
    )


# ---------------------------------------------------------------------------------------------- rendering


def _table(of: Mapping[str, Mapping[str, Any]]) -> list[str]:
    head = (
        "group",
        "rows",
        "prompts",
        "prompt p5/p50/p95/max",
        "response p5/p50/p95/max",
        "chosen longer",
        "corr",
    )
    body = []
    for group, n in of.items():
        pairs, ties = n["pairs"], n["pairs"] - n["chosen_longer"] - n["chosen_shorter"]
        share = f"{(n['chosen_longer'] + ties / 2) / pairs:.1%}" if pairs else "-"
        lengths = ("/".join(map(str, n[key].values())) or "-" for key in ("prompt_tokens", "response_tokens"))
        correlation = "-" if n["length_correlation"] is None else f"{n['length_correlation']:+.2f}"
        body.append((group, str(n["rows"]), str(n["prompts"]), *lengths, share, correlation))
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in (head, *body)
    ]


def _paint(text: str, code: str, color: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if color else text


def dump(rows: Sequence[Row], tokenizer: Any, groups: Sequence[str], color: bool = False) -> str:
    """The tokens of the rows, "|" between tokens, special ones in brackets; the middle of long texts left out.

    With ``color`` unscored (prompt) tokens are dim, scored ones green and special ones bold.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    half = DUMPED_TOKENS // 2

    def tokens(ids: np.ndarray, scored: bool) -> str:
        shown = list(ids) if len(ids) <= 2 * half else [*ids[:half], None, *ids[-half:]]
        pieces = []
        for index in shown:
            if index is None:
                pieces.append(f"[.. {len(ids) - 2 * half} more ..]")
                continue
            text = tokenizer.decode([int(index)])
            if "\ufffd" in text:  # part of a character: the vocabulary's own name of these bytes
                text = tokenizer.convert_ids_to_tokens(int(index))
            text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
            style = "1" if index in special else ("32" if scored else "2")
            pieces.append(_paint(f"[{text}]" if index in special else text, style, color))
        return "|".join(pieces)

    lines = []
    for row in rows:
        lines.append(f"{row.uid}  group {groups[row.group]}  weight {row.weight:g}")
        lines.append(f"  prompt ({len(row.prompt)}, not scored)  {tokens(row.prompt, False)}")
        for role, ids in zip(row.roles, row.responses, strict=True):
            lines.append(f"  {role} ({len(ids)}, scored)  {tokens(ids, True)}")
    return "\n".join(lines)
