"""The data audit: every planted defect gives exactly its finding, clean data none."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoTokenizer

from data.passport import Counts, dump, passport
from data.schema import Example
from preference_datasets import Tokenization, tokenize
from scripts.make_tokenizer import ASSET
from utils import content_hash

GROUPS = ("a", "b")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ASSET)


def clean_examples() -> dict[str, list[Example]]:
    """Two groups, two pairs a prompt, chosen longer as often as shorter."""

    def pairs(split, first, count):
        found = []
        for k in range(first, first + count):
            for j in range(2):
                texts = [f" answer {k}-{j} " + "x" * (k % 7), f" other {k}-{j} " + "y" * (6 - k % 7)]
                chosen, rejected = texts if k % 2 else texts[::-1]
                responses = (("chosen", chosen), ("rejected", rejected))
                found.append(Example(f"d/{split}:{k}#{j}", f"Question {k}?", responses, GROUPS[k % 2]))
        return found

    return {"train": pairs("train", 0, 60), "test": pairs("test", 60, 20)}


def audit(splits, tokenizer, change_rows=None, **limits):
    counts = Counts()
    limits = {"max_length": 100, "max_prompt_length": 50, **limits}
    rows = {
        split: tokenize(examples, tokenizer, Tokenization(**limits), groups=GROUPS, counts=counts)
        for split, examples in splits.items()
    }
    if change_rows:
        change_rows(rows)
    return passport(rows, counts, GROUPS, tokenizer, first_batch=rows["train"][:2])


def codes(made) -> list[str]:
    return [finding.code for finding in made.findings]


def first(splits, **changes) -> None:
    splits["train"][0] = replace(splits["train"][0], **changes)


def pair(chosen, rejected):
    return {"responses": (("chosen", chosen), ("rejected", rejected))}


def test_clean_data_give_no_finding(tokenizer):
    made = audit(clean_examples(), tokenizer)
    assert made.findings == ()
    assert made.summary() == "data: train 120, test 40 rows in 2 groups; findings: none"


def identical(splits):
    first(splits, **pair(" same", " same"))


def leak(splits):
    splits["test"][4] = replace(splits["test"][4], prompt="Question 8?")


def two_groups(splits):
    first(splits, group="b")


def conflict(splits):
    chosen, rejected = (text for _, text in splits["train"][6].responses)
    splits["train"].append(replace(splits["train"][6], uid="d/train:again", **pair(rejected, chosen)))


def long_wins(splits):
    for i, one in enumerate(splits["train"]):
        if one.group == "a":
            splits["train"][i] = replace(one, **pair(f" long {i} and more of it", " short"))


def short_wins(splits):
    for i, one in enumerate(splits["train"]):
        if one.group == "b":
            splits["train"][i] = replace(one, **pair(" short", f" long {i} and more of it"))


def empty(splits):
    first(splits, **pair("", " no"))


def long_prompt(splits):
    first(splits, prompt="Q" * 90)


def long_response(splits):
    first(splits, **pair(" no", "R" * 120))


def blank_target(splits):
    for split, examples in splits.items():
        splits[split] = [replace(e, responses=(("target", e.responses[0][1]),)) for e in examples]
    first(splits, responses=(("target", " \n"),))


def untrained(splits):
    splits["train"] = [e for e in splits["train"] if e.group == "a"]


def unmeasured(splits):
    splits["test"] = [e for e in splits["test"] if e.group == "a"]


PLANTED = {
    "identical_pairs": identical,
    "shared_prompts_splits": leak,
    "shared_prompts_groups": two_groups,
    "conflicting_labels": conflict,
    "length_bias": long_wins,
    "empty": empty,
    "prompts_cut": long_prompt,
    "responses_cut": long_response,
    "blank_targets": blank_target,
    "group_without_training_rows": untrained,
    "group_without_evaluation_rows": unmeasured,
}


@pytest.mark.parametrize("code", PLANTED)
def test_a_planted_defect_gives_exactly_its_finding(tokenizer, code):
    splits = clean_examples()
    PLANTED[code](splits)
    assert codes(audit(splits, tokenizer)) == [code]


def test_a_short_bias_is_found_too(tokenizer):
    splits = clean_examples()
    short_wins(splits)
    (finding,) = audit(splits, tokenizer).findings
    assert finding.message == "train/b: chosen is the longer response in 0% of 60 pairs of unequal length"


def test_a_dropped_row_is_found(tokenizer):
    splits = clean_examples()
    long_prompt(splits)
    made = audit(splits, tokenizer, truncation="drop")
    assert codes(made) == ["dropped"]
    assert made.findings[0].message.endswith(": 1 of 160")


def damage(tokenizer, prompt=(), chosen=()):
    def change(rows):
        row = rows["train"][3]
        responses = (np.array([*row.responses[0][:-1], *chosen], np.int32), row.responses[1])
        rows["train"][3] = replace(
            row, prompt=np.array([*prompt, *row.prompt], np.int32), responses=responses
        )

    return change


def test_wrong_special_tokens_are_found(tokenizer):
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for code, change in {
        "double_bos": {"prompt": [bos], "chosen": [eos]},
        "missing_eos": {"chosen": [65]},
        "double_eos": {"chosen": [eos, eos]},
    }.items():
        made = audit(clean_examples(), tokenizer, damage(tokenizer, **change))
        assert codes(made) == [code]
        assert made.findings[0].uids == ("d/train:1#1",)


def test_an_unfinished_response_without_eos_is_no_finding(tokenizer):
    splits = clean_examples()
    first(splits, response_scalars={"finished": (0.0, 1.0)})
    assert audit(splits, tokenizer).findings == ()


def test_the_implied_noise_is_that_of_independent_labels(tokenizer):
    """10 comparisons labelled twice, 2 of them both ways: d = 0.2 = 2 e (1 - e), e = 0.1127."""
    examples = []
    for k in range(10):
        ways = [(" yes", " no"), (" no", " yes") if k < 2 else (" yes", " no")]
        for j, (chosen, rejected) in enumerate(ways):
            examples.append(
                Example(f"d/train:{k}#{j}", f"Q{k}", (("chosen", chosen), ("rejected", rejected)), "a")
            )
    same = (("chosen", " eh"), ("rejected", " eh"))  # equal responses say nothing about noise
    examples += [Example(f"d/train:same{j}", "Q", same, "a") for j in range(9)]
    equal, finding = audit({"train": examples}, tokenizer).findings
    assert (equal.code, finding.code) == ("identical_pairs", "conflicting_labels")
    assert finding.count == 2
    assert "20.0% disagree" in finding.message
    assert "11.3% of the labels are wrong" in finding.message


def test_the_numbers_are_those_of_the_rows(tokenizer):
    texts = [(" aaa", " b"), (" a", " bb"), (" cc", " dd")]
    examples = [
        Example(f"u{i}", "Q" * (i + 1), (("chosen", c), ("rejected", r)), "a")
        for i, (c, r) in enumerate(texts)
    ]
    made = audit({"train": examples}, tokenizer)
    got = made.splits["train"]["a"]
    assert (got["rows"], got["prompts"], got["pairs"]) == (3, 3, 3)
    assert got["prompt_tokens"] == {"p5": 2, "p50": 3, "p95": 4, "max": 4}
    assert got["response_tokens"]["max"] == 5
    assert (got["chosen_longer"], got["chosen_shorter"]) == (1, 1)
    chosen, rejected = [5, 3, 4], [3, 4, 4]
    expected = np.corrcoef([*chosen, *rejected], [1, 1, 1, 0, 0, 0])[0, 1]
    assert got["length_correlation"] == pytest.approx(expected, abs=1e-4)
    assert made.tokens["train"] == 2 + 3 + 4 + sum(chosen) + sum(rejected)


def test_the_json_is_complete_and_its_hash_sees_a_change(tokenizer):
    splits = clean_examples()
    one, same = audit(splits, tokenizer).to_dict(), audit(splits, tokenizer).to_dict()
    assert json.loads(json.dumps(one)) == one
    assert one == same
    assert one.pop("hash") == content_hash(one)
    identical(splits)
    other = audit(splits, tokenizer).to_dict()
    assert other["hash"] != same["hash"]
    assert other["findings"][0]["uids"] == ["d/train:0#0"]


def test_the_text_has_every_part(tokenizer):
    splits = clean_examples()
    empty(splits)
    text = audit(splits, tokenizer).render()
    assert "\x1b" not in text
    for part in (
        "train:",
        "test:",
        "chosen longer",
        "rows kept: 160 (a 80, b 80)",
        "empty: responses without text",
    ):
        assert part in text
    assert "prompt (12, not scored)  [<bos>]|Q|u|e" in text
    assert "chosen (1, scored)  [<eos>]" in text
    assert "d/train:0#0  group a  weight 1" in text
    rows = tokenize(splits["train"], tokenizer, Tokenization(), groups=GROUPS, counts=Counts())
    made = passport({"train": rows}, Counts(), GROUPS, tokenizer, first_batch=rows[:20])
    assert made.render().endswith("and 12 rows more")


def test_the_dump_paints_scored_tokens_and_never_prints_control_characters(tokenizer):
    example = Example("u", "a\x1b[2J\u202e\u6f22", (("target", "yes\n"),), "a")
    rows = tokenize([example], tokenizer, Tokenization(), groups=GROUPS, counts=Counts())
    bare, painted = dump(rows, tokenizer, GROUPS), dump(rows, tokenizer, GROUPS, color=True)
    assert bare.isascii() is False
    assert all(c.isprintable() or c == "\n" for c in bare)
    assert "\\x1b|[|2|J|" in bare
    assert "\ufffd" not in bare
    assert "\x1b[32my\x1b[0m" in painted, "scored: green"
    assert "\x1b[2ma\x1b[0m" in painted, "not scored: dim"
    assert "\x1b[1m[<eos>]\x1b[0m" in painted, "special: bold"
    assert "\\n|[<eos>]" in bare


def test_a_long_text_is_shortened_in_the_middle(tokenizer):
    example = Example("u", "p" * 200, (("target", "yes"),), "a")
    rows = tokenize([example], tokenizer, Tokenization(), groups=GROUPS, counts=Counts())
    assert "[.. 153 more ..]" in dump(rows, tokenizer, GROUPS)


def test_counts_are_merged_by_kind_and_group():
    counts = Counts()
    counts.add("rows", "a", 3)
    counts.add("rows", "b")
    counts.add("empty", "a", 0)
    assert counts.to_dict() == {"rows": {"a": 3, "b": 1}}
    assert counts.lines() == ["rows kept: 4 (a 3, b 1)"]


def test_real_dialogues_raise_no_false_alarm(real_data_dir, tokenizer):
    """The only findings on published pairs are those that are true of them: a response without text."""
    marker, examples = "\n\nAssistant:", []
    with gzip.open(real_data_dir / "hh_harmless_base_test.jsonl.gz", "rt", encoding="utf-8") as lines:
        for i, line in enumerate(lines):
            row = json.loads(line)
            end = row["chosen"].rfind(marker) + len(marker)
            if row["rejected"][:end] == row["chosen"][:end]:
                responses = (("chosen", row["chosen"][end:]), ("rejected", row["rejected"][end:]))
                examples.append(Example(f"hh/train:{i}", row["chosen"][:end], responses, "a"))
    made = audit({"train": examples[:400]}, tokenizer, max_length=20_000, max_prompt_length=10_000)
    blank = sum(not text.strip() for example in examples[:400] for _, text in example.responses)
    assert codes(made) == ["empty"]
    assert made.findings[0].count == blank == 1
