"""python -m bandits.document RESULTS [FILE]: write finished experiments' claims into docs/bandits.md (or FILE).

RESULTS is the ``run_root`` of bandits.run. Every experiment found there fills its block, from ``<!-- results NAME -->`` to
``<!-- end -->``; blocks of other experiments stay as they are. The block ``<!-- summary -->`` counts the verdicts of all.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from utils import UserError, write_atomic

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "bandits.md"
BLOCK = re.compile(r"<!-- results (?P<name>\S+) -->\n(?P<body>.*?)<!-- end -->\n", re.DOTALL)
SUMMARY = re.compile(r"<!-- summary -->\n.*?<!-- end -->\n", re.DOTALL)
TIME = re.compile(r", (\d+) s of CPU")
VERDICTS = ("agrees", "undecided", "disagrees")


def claim_row(row: dict[str, str]) -> str:
    """One line of the table from one of claims.csv."""
    value, low, high = (f"{float(row[k]):.3g}" for k in ("value", "low", "high"))
    quantity = f"{row['metric']}{', difference' if row['right'] else ''}"
    cells = (row["claim"], quantity, f"{value} [{low}, {high}]", row["bound"], row["n"], row["verdict"])
    return f"| {' | '.join(cells)} |"


def block(folder: Path) -> str:
    """Command, time and claims of one finished experiment. Raises UserError for an unfinished one."""
    last = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1:]
    end = json.loads(last[0]) if last else {}
    if end.get("kind") != "end":
        raise UserError(f"{folder}: this experiment has not finished; run it again")
    with (folder / "claims.csv").open(encoding="utf-8") as handle:
        rows = [claim_row(row) for row in csv.DictReader(handle)]
    head = "| claim | quantity | value [95 % interval] | bound | n | verdict |\n|---|---|---|---|---|---|"
    command = f"`python -m bandits.run +experiment={folder.name}`, {end['cpu_time']:.0f} s of CPU"
    return "\n".join((command, "", head, *rows, ""))


def summary(text: str) -> str:
    """Time and verdicts of every block in the document."""
    lines = ["| experiment | CPU time | agrees | undecided | disagrees |", "|---|---|---|---|---|"]
    totals = dict.fromkeys(VERDICTS, 0)
    for found in BLOCK.finditer(text):
        name, body, seconds = found["name"], found["body"], TIME.search(found["body"])
        counts = [len(re.findall(rf"\| {verdict} \|$", body, re.MULTILINE)) for verdict in VERDICTS]
        for verdict, count in zip(VERDICTS, counts, strict=True):
            totals[verdict] += count
        time = "" if seconds is None else f"{seconds[1]} s"
        lines.append(f"| [`{name}`](#{name}) | {time} | {' | '.join(map(str, counts))} |")
    lines.append(f"| all | | {' | '.join(map(str, totals.values()))} |")
    return "\n".join((*lines, ""))


def fill(text: str, results: Path) -> str:
    """The document with the blocks of the experiments under ``results`` written anew. Raises UserError for one without a block."""
    folders = {path.parent.name: path.parent for path in sorted(results.glob("*/claims.csv"))}
    if not folders:
        raise UserError(f"{results}: no claims.csv in any folder there; name the run_root of bandits.run")
    for name in folders:
        if f"<!-- results {name} -->" not in text:
            raise UserError(
                f"the document has no block for {name}: add <!-- results {name} --> and <!-- end -->"
            )

    def renew(found: re.Match[str]) -> str:
        body = block(folders[found["name"]]) if found["name"] in folders else found["body"]
        return f"<!-- results {found['name']} -->\n{body}<!-- end -->\n"

    text = BLOCK.sub(renew, text)
    return SUMMARY.sub(lambda _: f"<!-- summary -->\n{summary(text)}<!-- end -->\n", text)


def main(words: Sequence[str]) -> int:
    """Returns the exit code."""
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return 0
    try:
        if not 1 <= len(words) <= 2:
            raise UserError("give the folder of results, and the document if it is not docs/bandits.md")
        target = Path(words[1]) if len(words) == 2 else DOCUMENT
        if not target.is_file():
            raise UserError(f"{target}: no such document")
        write_atomic(target, fill(target.read_text(encoding="utf-8"), Path(words[0])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
