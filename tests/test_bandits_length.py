"""The length tasks: laws, masks and rewards, by loops and by enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from bandits import length
from bandits.length import LengthBandit
from bandits.policies import Transformer
from bandits.worlds import WarmStart

SMALL = Transformer(vocabulary=3, num_tokens=4, layers=1, heads=1, width=8)


def test_the_token_law_gives_the_length_law():
    law, tokens = length.length_law(12), length.token_law(12, 12)
    assert law.argmax() == 6 and law.sum() == pytest.approx(1) and tokens.sum(1) == pytest.approx(np.ones(12))
    lasting, found = 1.0, []
    for t in range(12):
        found.append(lasting * tokens[t, 0])
        lasting *= 1 - tokens[t, 0]
    assert [*found, lasting] == pytest.approx(law)


def test_lengths_and_scored_tokens_stop_at_the_first_end():
    world = LengthBandit(10, [0], SMALL, WarmStart(1), num_eval=2)
    actions = torch.tensor([[1, 2, 0, 1], [0, 0, 2, 2], [1, 1, 2, 2], [2, 0, 0, 0]])
    assert length.lengths(actions).tolist() == [2, 0, 4, 1]
    assert world.live(actions).tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert world.rewards(torch.zeros(4), actions).tolist() == [0.5, 1.0, 0.0, 0.75]
    far = torch.full((1, 12), 1)
    assert LengthBandit(11, [0], num_eval=2).rewards(torch.zeros(1), far).tolist() == [0.5]


def test_probabilities_of_all_responses_sum_to_one():
    """Responses that differ after their end are one response."""
    world = LengthBandit(10, [0], SMALL, WarmStart(5), num_eval=2)
    params = world.warm_start(world.draw_prompts(1))
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    ended = (every == 0).cumsum(-1) - (every == 0).long() > 0
    distinct = every.masked_fill(ended, 0).unique(dim=0)
    logps = world.token_logps(params, torch.tensor([[1]]), distinct[None, None]).sum(-1)
    assert len(distinct) == 1 + 2 + 4 + 8 + 16 and float(logps.exp().sum()) == pytest.approx(1, abs=1e-6)


def test_imitation_reaches_the_lengths_and_skewed_data_are_short():
    world = LengthBandit(12, [0, 1], warm=WarmStart(150, prompts=16), num_eval=100)
    prompts = world.draw_prompts(20)
    params = world.warm_start(prompts)
    measured = world.evaluate(params)
    assert measured["length"].numpy() == pytest.approx([6, 6], abs=0.5)
    assert measured["kl_policy_reference"].abs().max() < 1e-9
    short = length.lengths(world.first_actions(params, prompts, 8)).double()
    # 1 + floor of an exponential of mean 1 has mean 1 + 1 / (e - 1) = 1.58
    assert float(short.mean()) == pytest.approx(1.58, abs=0.15)
    free = length.lengths(world.sample(params, prompts, 8)).double()
    assert float((free < 3).double().mean()) < 0.03
