"""One self-contained HTML page per run: results, curves, samples side by side, settings. It opens from disk, without a server.

    python -m commands.report runs/dpo_seed_0 [more runs ...] [out=FILE.html]

out=FILE   default: <run>/figures/report.html (only for a single run)
"""

from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any

from config.build import build
from plot_scripts import canvas
from plot_scripts.aggregate import bar, warnings_about
from plot_scripts.draw import compose, drawable, read_figure
from plot_scripts.load import Loaded, find_runs, load_directories, read_rows
from plot_scripts.panels import group_label
from plot_scripts.sources import parse_words, run
from utils import UserError, make_folder, write_atomic

FIGURES = ("training_curves", "by_group", "worst_group", "throughput")
AGGREGATES = ("", "mean_group", "worst_group")
FIRST = ("rewards/accuracies", "loss")  # of the table of results
NOT_SHOWN = ("group_counts", "num_examples")
PIXELS = 150  # on the page, per inch of a figure
HARDEST = 10  # examples with the largest loss that are listed
STYLE = """
:root{color-scheme:light dark;--ink:#222;--paper:#fff;--pale:#666;--line:#ddd;--row:#f5f7f9;--link:#0060a0;--warn:#7a2e00;--warnpaper:#fff4e8;--warnline:#e0b080}
@media (prefers-color-scheme:dark){:root{--ink:#ddd;--paper:#161819;--pale:#9a9fa3;--line:#3a3f43;--row:#212527;--link:#7fbcf0;--warn:#ffcf9e;--warnpaper:#33261a;--warnline:#7a5530}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1080px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em;margin-bottom:.1em}h2{font-size:1.15em;margin-top:2em;border-bottom:1px solid var(--line);padding-bottom:.2em}
.facts{color:var(--pale)}.warn{background:var(--warnpaper);border:1px solid var(--warnline);color:var(--warn);padding:.5em .8em;border-radius:4px;margin:.4em 0}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.86em}th,td{padding:.25em .7em;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
th{color:var(--pale);font-weight:600}.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}.ci{display:block;color:var(--pale);font-size:.82em}
tbody tr:hover{background:var(--row)}.from{display:block;font-weight:400;font-size:.9em;overflow-wrap:anywhere}
img{max-width:100%;height:auto;background:#fff;border-radius:4px}td.text{white-space:pre-wrap;min-width:11em;max-width:26em;overflow-wrap:anywhere}
pre{background:var(--row);padding:.8em;overflow-x:auto;font-size:.82em}details{margin:.6em 0}summary{cursor:pointer;color:var(--link)}
"""


@dataclass(frozen=True)
class Request:
    """The words of the command line."""

    runs: list[str] = field(default_factory=list)
    out: str | None = None


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True, text: bool = False
) -> str:
    """Cells are HTML already. ``numbers``: all columns but the first are right-aligned; ``text``: keep line breaks."""
    kind = ' class="text"' if text else ' class="n"' if numbers else ""
    top = f"<th>{head[0]}</th>" + "".join(f"<th{kind}>{h}</th>" for h in head[1:])
    body = "".join(
        f"<tr><td>{row[0]}</td>" + "".join(f"<td{kind}>{cell}</td>" for cell in row[1:]) + "</tr>\n"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>\n'


# ---------------------------------------------------------------------------------------------- sections


def header(loaded: Loaded, folder: Path) -> str:
    info = loaded.runs[0]
    numbers = loaded.table
    facts = {
        "method": info.method,
        "seed": info.seed,
        "status": _json(folder / "results.json").get("status", "finished")
        if info.finished
        else "not finished",
        "steps": _count(numbers["step"].max()),
        "examples": _count(numbers["examples"].max()),
        "commit": ", ".join(c[:7] for c in info.commits) + (" (uncommitted changes)" if info.dirty else ""),
        "config": info.config_hash[:12],
        "config without seed": info.config_hash_no_seed[:12],
        "started": _json(folder / "provenance.json").get("started", ""),
    }
    shown = " · ".join(
        f"{escape(k)}: <b>{escape(str(v))}</b>" for k, v in facts.items() if v not in ("", None)
    )
    warnings = "".join(f'<div class="warn">{escape(w)}</div>' for w in warnings_about(loaded, loaded.methods))
    name = str(info.config.get("run_dir", info.run))  # of a multirun's job, its settings too
    return f'<h1>{escape(name)}</h1>\n<p class="facts">{shown}</p>\n{warnings}'


def _count(value: float) -> str:
    return "0" if value != value else f"{value:,.0f}"


def results(loaded: Loaded) -> str:
    """The last evaluation of every split: overall, mean and worst over groups, each group; 95 % intervals where there are some."""
    parts = []
    method = loaded.methods[0]
    for split in ("test", "eval", "train_eval"):
        logged = {m for _, s, m, _ in loaded.series if s == split and "/ci_" not in m and m not in NOT_SHOWN}
        metrics = [m for m in FIRST if m in logged] + sorted(logged - set(FIRST))
        groups = list(
            dict.fromkeys(
                g
                for m in metrics
                for g in [a for a in AGGREGATES if loaded.has(split, m, a)] + loaded.groups(split, m)
            )
        )
        rows = []
        for metric in metrics:
            cells = []
            for group in groups:
                value = bar(loaded, method, split, metric, group)
                cells.append("" if value is None else _digits(value.mean, 4) + _bounds(value.low, value.high))
            rows.append([escape(metric), *cells])
        if rows:
            at = max(float(x[-1]) for (_, s, _, _), (x, _) in loaded.series.items() if s == split)
            head = ["metric", *(escape(group_label(g)) for g in groups)]
            parts.append(f"<h2>Results: {split}, after {at:,.0f} examples</h2>\n" + table(head, rows))
    return "".join(parts)


def _bounds(low: float, high: float) -> str:
    return f' <span class="ci">[{_digits(low, 3)}, {_digits(high, 3)}]</span>' if low == low else ""


def _digits(value: float, n: int) -> str:
    """``n`` significant digits, zeros at the end included, so that columns align; whole numbers as they are."""
    return str(value) if isinstance(value, int) else f"{value:#.{n}g}".rstrip(".")


def curves(loaded: Loaded) -> str:
    """The figures that this run has something for, as inline PNG."""
    parts = []
    for name in FIGURES:
        _, figure = read_figure(name)
        figure = replace(figure, panels=[replace(p, optional=True) for p in figure.panels])
        if drawable(figure, loaded):
            buffer = io.BytesIO()
            with canvas.styled():
                drawn = compose(figure, loaded).figure
                drawn.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
            data = base64.b64encode(buffer.getvalue()).decode("ascii")
            width = round(
                drawn.get_size_inches()[0] * PIXELS
            )  # one scale: the text of all figures has one size
            parts.append(f'<p><img alt="{name}" width="{width}" src="data:image/png;base64,{data}"></p>\n')
    return "<h2>Curves</h2>\n" + "".join(parts) if parts else ""


def samples(loaded: Loaded, folder: Path) -> str:
    """Responses to the same prompts: of the policy at the first evaluation (in a preference run, the SFT model that it starts
    from), of the reference, and of the policy now."""
    files = sorted(
        (p for p in (folder / "samples").glob("*.jsonl") if p.stem.isdigit()), key=lambda p: int(p.stem)
    )
    if not files:
        return ""
    columns: dict[str, dict[str, str]] = {}
    prompts: dict[str, tuple[str, str]] = {}
    first, last = (f"policy at {int(file.stem):,} examples" for file in (files[0], files[-1]))
    for file, policy in {files[0]: first, files[-1]: last}.items():
        for row in read_rows(file):
            name = policy if row["model"] == "policy" else row["model"]
            cut = "" if row.get("finished", True) else " […]"
            columns.setdefault(name, {})[row["uid"]] = escape(row["sample"]) + cut
            prompts.setdefault(row["uid"], (row.get("group", ""), row["prompt"]))
    order = sorted(columns, key=lambda name: (name == last, name == "reference"))
    heads = {name: escape(name) for name in order}
    archive = loaded.runs[0].config.get("model.archive")
    if archive and files[0].stem == "0":
        heads[first] += f'<span class="from">{escape(str(archive))}</span>'
    rows = [
        [escape(group), escape(prompt), *(columns[c].get(uid, "") for c in order)]
        for uid, (group, prompt) in prompts.items()
    ]
    note = "<p>One draw each, at temperature 1. […]: cut at the length limit.</p>\n"
    return "<h2>Samples</h2>\n" + note + table(["group", "prompt", *heads.values()], rows, text=True)


def hardest(folder: Path) -> str:
    """The held-out examples with the largest loss at the last evaluation."""
    held_out = [p for split in ("eval", "test") for p in folder.glob(f"records/{split}-*.jsonl")]
    files = [p for p in held_out if p.stem.rpartition("-")[2].isdigit()]
    if not files:
        return ""
    last = max(files, key=lambda p: (int(p.stem.rpartition("-")[2]), p.stem))
    rows = sorted(read_rows(last), key=lambda r: -r["loss"])[:HARDEST]
    shown = [
        k
        for k in ("loss", "rewards/margins", "rewards/chosen", "rewards/rejected", "num_tokens")
        if any(k in r for r in rows)
    ]
    cells = [
        [escape(r["uid"]), escape(r["group"]), *(_digits(r[k], 4) if k in r else "" for k in shown)]
        for r in rows
    ]
    return f"<h2>Largest losses ({escape(last.stem)})</h2>\n" + table(["example", "group", *shown], cells)


def settings(folder: Path) -> str:
    parts = []
    for title, name in (
        ("Configuration", "config.yaml"),
        ("Provenance", "provenance.json"),
        ("Final results", "results.json"),
    ):
        if (folder / name).is_file():
            content = escape((folder / name).read_text(encoding="utf-8"))
            parts.append(f"<details><summary>{title} ({name})</summary><pre>{content}</pre></details>\n")
    return "<h2>Settings</h2>\n" + "".join(parts) if parts else ""


def _json(path: Path) -> Mapping[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# ---------------------------------------------------------------------------------------------- the page


def page(folder: Path) -> str:
    """The whole page of one run directory."""
    loaded = load_directories([folder])
    title = escape(loaded.runs[0].run)
    body = (
        header(loaded, folder)
        + results(loaded)
        + curves(loaded)
        + samples(loaded, folder)
        + hardest(folder)
        + settings(folder)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n{body}</body></html>\n"
    )


def main(words: Sequence[str]) -> list[Path]:
    if {"-h", "--help"} & set(words):
        print(__doc__)
        return []
    request = build(Request, parse_words(words, lists=("runs",), paths="runs"), "")
    folders = find_runs(request.runs)
    if request.out is not None and len(folders) > 1:
        raise UserError(
            f"out={request.out}: one file, but {len(folders)} runs; leave out= away, each run gets its own page"
        )
    written = []
    for folder in folders:
        path = Path(request.out) if request.out is not None else folder / "figures" / "report.html"
        make_folder(path.parent)
        write_atomic(path, page(folder))
        written.append(path)
    return written


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
