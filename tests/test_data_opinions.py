"""The generated opinions follow their law, and the law is what it claims to be."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter

import numpy as np
import pytest
from scipy.stats import binomtest

from commands import tradeoff
from config.compose import compose
from data import opinions, optima
from data.opinions import ANSWERS, GROUPS, LETTERS, TOPICS, WORDINGS
from utils import UserError, stream

CELLS = list(itertools.product(GROUPS, TOPICS, WORDINGS))
N = len(ANSWERS)
TOLERANCE = 4.5  # standard errors


@pytest.fixture(scope="module")
def data():
    return opinions.load("opinions", opinions.Settings(), 0)


def draws(cell, number: int, **settings) -> Counter:
    """How often each (chosen, rejected) occurs in pairs of one cell."""
    rng = stream(7, "test draws", *cell)
    examples = [
        opinions.draw("0", *cell, ("May", "21"), opinions.Settings(**settings), rng) for _ in range(number)
    ]
    return Counter(
        (LETTERS.index(e.response("chosen")), LETTERS.index(e.response("rejected"))) for e in examples
    )


def within(successes: int, trials: int, p: float) -> bool:
    """Exact binomial test: a false alarm in any of some 1,000 such checks has a probability of about 1 %."""
    return trials == 0 or binomtest(successes, trials, p).pvalue > 1e-5


# ---------------------------------------------------------------------------------------------- the law


def test_laws_are_probabilities_and_consistent():
    for cell in CELLS:
        law, joint, marginal = (
            opinions.response_law(*cell),
            opinions.pair_law(*cell),
            opinions.marginal_law(*cell),
        )
        assert law.shape == (N,) and law.min() > 0.05 and law.sum() == pytest.approx(1)
        assert np.allclose(joint, joint.T) and np.all(np.diag(joint) == 0) and joint.sum() == pytest.approx(1)
        assert np.allclose(joint[0, 1], law[0] * law[1] / (1 - (law**2).sum()))
        assert np.allclose(marginal, law * (1 - law) / (1 - (law**2).sum()))
        independent = opinions.pair_law(*cell, distinct=False)
        assert np.allclose(independent, np.outer(law, law)) and np.allclose(independent.sum(0), law)


def test_preferences_are_antisymmetric_and_noise_flips_labels():
    for cell in CELLS:
        for i, j in itertools.product(range(N), repeat=2):
            p = opinions.preference_probability(*cell, i, j)
            assert 0.02 < p < 0.98 and p + opinions.preference_probability(*cell, j, i) == pytest.approx(1)
            clean = opinions.preference_probability(*cell, i, j, noise=0.0)
            assert p == pytest.approx(0.97 * clean + 0.03 * (1 - clean))
            assert opinions.preference_probability(*cell, i, j, noise=0.5) == pytest.approx(0.5)


def test_preference_without_cycle_or_mixture_is_logistic_in_the_distance_from_the_ideal():
    # plain on taxes that shall rise: dissent, so the ideal is A; 2.2 log-odds a step
    assert opinions.ideal("plain", "taxes", "shall") == 0 and opinions.ideal("north", "taxes", "shall") == 4
    p = opinions.preference_probability("plain", "taxes", "shall", 1, 3, noise=0.0)
    assert p == pytest.approx(1 / (1 + math.exp(-2.2 * 2)))
    # south on taxes that might rise (no dissent): the ideal is 3, and 2 and 4 are equally far from it
    assert opinions.preference_probability("south", "taxes", "might", 2, 4) == pytest.approx(0.5)


def bradley_terry_residual(cell) -> float:
    """Largest |logit p_ij + logit p_jk + logit p_ki|: zero for every triple exactly when p is of Bradley-Terry form."""

    def logit(i, j):
        p = opinions.preference_probability(*cell, i, j, noise=0.0)
        return math.log(p / (1 - p))

    return max(
        abs(logit(i, j) + logit(j, k) + logit(k, i)) for i, j, k in itertools.combinations(range(N), 3)
    )


def cycles(cell) -> list[tuple[int, ...]]:
    beats = lambda i, j: opinions.preference_probability(*cell, i, j) > 0.5  # noqa: E731
    return [
        t
        for t in itertools.permutations(range(N), 3)
        if beats(t[0], t[1]) and beats(t[1], t[2]) and beats(t[2], t[0])
    ]


def test_exactly_the_planted_cells_are_not_of_bradley_terry_form():
    for cell in CELLS:
        cyclic, mixed = cell[1] == opinions.CYCLIC_TOPIC, cell[:2] == opinions.MIXED
        residual = bradley_terry_residual(cell)
        if cyclic or mixed:
            assert residual > 0.3, cell
        else:
            assert residual < 1e-9, cell
        # on the cyclic topic no ranking agrees with all preferences, and knowing that costs any ranking accuracy
        assert bool(cycles(cell)) == cyclic, cell
        gap = opinions.law_accuracy(*cell) - opinions.law_accuracy(*cell, ranking=True)
        assert gap > 0.01 if cyclic else abs(gap) < 1e-9, cell


def test_groups_conflict_the_more_the_smaller_they_are():
    sizes = [len(opinions.DISSENT[group]) for group in GROUPS]
    assert sizes == sorted(sizes) and sizes[0] == 0 and sizes[-1] >= 4
    for group, topic, wording in CELLS:
        if topic in opinions.DISSENT[group]:
            assert opinions.ideal(group, topic, wording) == 4 - opinions.ideal("north", topic, wording)

    # what the majority prefers is worse than chance for the smallest group
    def majority_rule(group):
        total = 0.0
        for topic, wording in itertools.product(TOPICS, WORDINGS):
            joint = opinions.pair_law(group, topic, wording)
            for i, j in itertools.permutations(range(N), 2):
                p = opinions.preference_probability(group, topic, wording, i, j)
                q = opinions.preference_probability("north", topic, wording, i, j)
                total += (
                    joint[i, j] * (p if q > 0.5 else 1 - p if q < 0.5 else 0.5) / len(CELLS) * len(GROUPS)
                )
        return total

    assert majority_rule("plain") < 0.4 < 0.75 < majority_rule("north")


# ---------------------------------------------------------------------------------------------- the data


@pytest.mark.parametrize(
    "cell", [("north", "taxes", "shall"), ("plain", "loans", "might"), (*opinions.MIXED, "shall")]
)
def test_answers_and_labels_follow_the_law(cell):
    seen = draws(cell, 4000)
    total = seen.total()
    joint = opinions.pair_law(*cell)
    for i, j in itertools.combinations(range(N), 2):
        won, lost = seen[i, j], seen[j, i]
        assert within(won + lost, total, joint[i, j] + joint[j, i]), (i, j)
        assert within(won, won + lost, opinions.preference_probability(*cell, i, j)), (i, j)
    assert not any(seen[i, i] for i in range(N))


def test_independent_answers_keep_equal_pairs():
    cell = ("north", "wages", "might")
    seen = draws(cell, 2000, distinct_pairs=False)
    law = opinions.response_law(*cell)
    for i in range(N):
        assert within(seen[i, i], seen.total(), law[i] ** 2)
    example = opinions.draw("0", *cell, ("May", "21"), opinions.Settings(noise=0.5), stream(0, "x"))
    assert example.meta["p_star"] == pytest.approx(0.5)


def test_all_data_follow_the_law(data):
    """Over all cells at once: answers against ``marginal_law``, labels against ``preference_probability``."""
    answers, labels = Counter(), Counter()
    cells = Counter()
    for e in data["train"]:
        cell = (e.group, e.meta["topic"], e.meta["wording"])
        i, j = (LETTERS.index(e.response(role)) for role in ("chosen", "rejected"))
        assert e.meta["p_star"] == pytest.approx(opinions.preference_probability(*cell, i, j))
        cells[cell] += 1
        answers.update([(cell, i), (cell, j)])
        labels[cell, i, j] += 1
    for cell, n in cells.items():
        for i in range(N):  # the number of pairs that hold i is binomial: i is at most once in a pair
            assert within(answers[cell, i], n, 2 * opinions.marginal_law(*cell)[i]), (cell, i)
        for i, j in itertools.combinations(range(N), 2):
            won, lost = labels[cell, i, j], labels[cell, j, i]
            if won + lost:
                assert within(won, won + lost, opinions.preference_probability(*cell, i, j)), (cell, i, j)


def test_bayes_accuracy_in_three_ways(data):
    """Mean of max(p, 1 - p); how often the rule that knows the law is right on the labels; the law itself."""
    for split, group in itertools.product(data, GROUPS):
        examples = [e for e in data[split] if e.group == group]
        bayes = opinions.bayes_accuracy(examples)
        p = np.array([e.meta["p_star"] for e in examples])
        right = (p > 0.5) + 0.5 * (p == 0.5)
        spread = np.sqrt((np.maximum(p, 1 - p) * np.minimum(p, 1 - p)).sum()) / len(p)
        assert abs(right.mean() - bayes) < TOLERANCE * spread
        exact = np.mean([opinions.law_accuracy(group, *c) for c in itertools.product(TOPICS, WORDINGS)])
        assert abs(bayes - exact) < TOLERANCE * np.maximum(p, 1 - p).std() / math.sqrt(len(p))
        assert 0.83 < exact < 0.88


def test_splits_have_the_sizes_and_groups_asked_for(data):
    assert {split: len(part) for split, part in data.items()} == {
        "train": 4000,
        "validation": 500,
        "test": 1000,
    }
    assert list(Counter(e.group for e in data["train"]).values()) != [800] * 5
    assert Counter(e.group for e in data["train"]) == dict(
        zip(GROUPS, (1800, 1000, 600, 400, 200), strict=True)
    )
    assert set(Counter(e.group for e in data["test"]).values()) == {200}
    small = opinions.Settings(num_train=11, num_validation=0, num_test=7, balance_evaluation=False)
    few = opinions.load("mine", small, 0)
    assert {split: len(part) for split, part in few.items()} == {"train": 11, "test": 7}
    assert set(Counter(e.group for e in few["train"])) == set(GROUPS)
    assert few["train"][0].uid.startswith("mine/train:")
    two = opinions.load("mine", opinions.Settings(num_train=100, group_sizes=[0.75, 0.25]), 0)
    assert Counter(e.group for e in two["train"]) == {"north": 75, "south": 25}


@pytest.mark.parametrize(
    ("n", "sizes"), [(10, [0.98, 0.01, 0.01]), (7, [0.2] * 5), (5, [0.96] + [0.01] * 4), (1000, [1 / 3] * 3)]
)
def test_group_counts_add_up(n, sizes):
    counts = opinions.group_counts(n, sizes)
    assert sum(counts) == n and min(counts) >= 1
    assert all(abs(c - n * s) < 1 or n * s < 1 or c == counts[0] for c, s in zip(counts, sizes, strict=True))


def test_splits_share_no_prompt_but_every_part_of_one(data):
    prompts = {split: {e.prompt for e in part} for split, part in data.items()}
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"] and not prompts["validation"] & prompts["test"]
    for split in data:
        assert {month for month, _ in opinions.waves(split)} == set(opinions.MONTHS)
        assert {year for _, year in opinions.waves(split)} == set(opinions.YEARS)
    cells = {
        split: {(e.group, e.meta["topic"], e.meta["wording"]) for e in part} for split, part in data.items()
    }
    assert cells["test"] <= cells["train"] == set(CELLS)


def test_prompts_are_short_ascii_and_pairs_of_one_prompt_consecutive(data):
    prompt = opinions.prompt_of("north", "wages", "shall", "May", "21")
    assert prompt == "May 21, north: wages shall rise.\nA ++ B + C 0 D - E --\n"
    for part in data.values():
        assert {len(e.prompt.encode("ascii")) for e in part} == {55}
        assert (
            len({e.prompt for e in part})
            == sum(a.prompt != b.prompt for a, b in itertools.pairwise(part)) + 1
        )
        assert len({e.uid for e in part}) == len(part)


def test_data_depend_on_the_data_seed_alone(data):
    again = opinions.load("opinions", opinions.Settings(), 99)
    assert again == data
    other = opinions.load("opinions", opinions.Settings(data_seed=1), 0)
    assert other["train"] != data["train"]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"num_train": 3}, "num_train=3: must be at least 5"),
        ({"num_validation": 2}, "num_validation=2: must be 0 or at least"),
        ({"group_sizes": [0.5, 0.6]}, "positive shares whose sum is 1"),
        ({"group_sizes": []}, "positive shares whose sum is 1"),
        ({"group_sizes": [1.5, -0.5]}, "positive shares whose sum is 1"),
        ({"noise": 0.6}, r"noise=0.6: must be in \[0, 0.5\]"),
    ],
)
def test_settings_are_checked(settings, problem):
    with pytest.raises(UserError, match=problem):
        opinions.Settings(**settings)


# ---------------------------------------------------------------------------------------------- groups that are not told


HIDDEN = opinions.Settings(
    group_in_prompt=False, group_sizes=[0.5, 0.3, 0.2], num_train=24000, num_validation=0, num_test=3
)


def test_hidden_groups_share_their_prompts():
    train = opinions.load("opinions", HIDDEN, 0)["train"]
    prompts = {g: {e.prompt for e in train if e.group == g} for g in GROUPS[:3]}
    assert prompts["north"] == prompts["south"] == prompts["coast"]
    assert not any(group in prompt for prompt in prompts["north"] for group in GROUPS)
    assert {e.meta["group"] for e in train} == set(GROUPS[:3])


def test_the_table_of_laws_gives_what_the_data_give():
    """Losses and accuracies of a policy with arbitrary scores, from 24,000 pairs and from the table."""
    table = opinions.law_table(GROUPS[:3], HIDDEN)
    assert table.sizes == pytest.approx([0.5, 0.3, 0.2]) and table.pair_law.sum() == pytest.approx(1)
    scores = np.random.default_rng(5).normal(size=(len(TOPICS) * len(WORDINGS), N))
    cells = list(itertools.product(TOPICS, WORDINGS))
    beta = 0.7
    exact_accuracy = tradeoff.accuracies(table, scores)
    margin = scores[:, :, None] - scores[:, None, :]
    loss = [(margin * s - 1 / (2 * beta)) ** 2 for s in (1, -1)]
    exact_loss = (table.pair_law * (table.preference * loss[0] + (1 - table.preference) * loss[1])).sum(
        (1, 2, 3)
    )
    examples = opinions.load("opinions", HIDDEN, 0)["train"]
    for g, group in enumerate(table.groups):
        h = np.array(
            [
                scores[cell][LETTERS.index(e.response("chosen"))]
                - scores[cell][LETTERS.index(e.response("rejected"))]
                for e in examples
                if e.group == group
                for cell in [cells.index((e.meta["topic"], e.meta["wording"]))]
            ]
        )
        for values, exact in ((h > 0, exact_accuracy[g]), ((h - 1 / (2 * beta)) ** 2, exact_loss[g])):
            error = values.std() / math.sqrt(len(values))
            assert abs(values.mean() - exact) < TOLERANCE * error and error < 0.1


def test_weighting_groups_moves_the_best_policy_as_the_weights_say():
    """Less loss for the worst group and more on average: the optimum of each weighting is the best in its own respect."""
    settings = opinions.Settings(group_in_prompt=False, group_sizes=[0.6, 0.25, 0.1, 0.05])
    losses = {
        name: found[0]
        for name, found in tradeoff.best_policies(settings, optima.Objective("ipo", 0.5)).items()
    }
    shares = np.array(settings.group_sizes)
    respects = {"uniform": lambda x: shares @ x, "importance": np.mean, "group_robust": np.max}
    for name, respect in respects.items():
        others = [respect(losses[other]) for other in losses if other != name]
        assert respect(losses[name]) < min(others) - 1e-3
    assert losses["group_robust"].max() == pytest.approx(0.841, abs=1e-3)


def test_told_groups_have_each_their_best_policy_whatever_the_weights():
    found = tradeoff.best_policies(opinions.Settings(), optima.Objective("ipo", 0.5))
    assert np.array_equal(found["uniform"][0], found["group_robust"][0]) and len(found["uniform"][0]) == 5
    assert found["uniform"][0].max() < 0.8


def test_the_tradeoff_is_printed_and_needs_data_with_a_known_law(capsys):
    words = ["loss=ipo", "loss.beta=0.5", "assert_sft_step=false", "datasets=[opinions]"]
    tradeoff.report(compose([*words, "data.opinions.group_in_prompt=false"]), tradeoff.Settings())
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert (
        rows[0][:2] == ["loss", "north"]
        and rows[3][:2] == ["group_robust,", "exact"]
        and float(rows[3][7]) < 0.97
    )
    with pytest.raises(UserError, match="goqa"):
        tradeoff.report(compose([*words[:3], "datasets=[goqa]"]), tradeoff.Settings())


def test_the_tradeoff_sets_runs_beside_the_optima_paired_over_seeds(tmp_path, capsys):
    """Two groups with shares 3/4 and 1/4, three seeds; differences 0.1, 0.2, 0.3 in the first group."""
    for name, shift in (("uniform", 0.0), ("group_robust", 0.1)):
        for seed in range(3):
            folder = tmp_path / name / str(seed)
            folder.mkdir(parents=True)
            (folder / "config.yaml").write_text(f"seed: {seed}\nweighting: {{name: {name}}}\n")
            metrics = {"loss/group_north": 1 + seed + shift * (seed + 1), "loss/group_south": 0.5}
            metrics |= {f"rewards/accuracies/group_{group}": 0.5 for group in GROUPS[:2]}
            metrics = {f"test/{key}": value for key, value in metrics.items()}
            (folder / "results.json").write_text(json.dumps({"splits": {"test": {"metrics": metrics}}}))
    words = ["loss=ipo", "loss.beta=0.5", "assert_sft_step=false", "datasets=[opinions]"]
    run = compose([*words, "data.opinions.group_in_prompt=false", "data.opinions.group_sizes=[0.75,0.25]"])
    tradeoff.report(run, tradeoff.Settings(runs=str(tmp_path)))
    printed = next(
        x for x in capsys.readouterr().out.splitlines() if x.strip().startswith("group_robust - uniform")
    )
    numbers = re.findall(r"(-?[\d.]+) ± ([\d.]+)", printed)  # north, south, worst, mean, by share
    half = 4.302653 * 0.1 / math.sqrt(3)  # t with two degrees of freedom
    expected = [(0.2, half), (0, 0), (0.2, half), (0.1, half / 2), (0.15, 0.75 * half)]
    assert np.array(numbers, dtype=float) == pytest.approx(np.array(expected), abs=6e-4)
    with pytest.raises(UserError, match="group_coast"):
        tradeoff.report(compose(words), tradeoff.Settings(runs=str(tmp_path)))
    with pytest.raises(UserError, match="no finished run"):
        tradeoff.report(run, tradeoff.Settings(runs=str(tmp_path / "uniform" / "0" / "nowhere")))
