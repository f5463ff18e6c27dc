"""DPO and IPO on the group-robust linear bandit: gradient descent with any weighting, and the IPO closed form.

A log-linear policy softmax_a <phi, theta> with a uniform reference has the margin h = <phi_w - phi_l, theta>. Weights come
from ``weighting`` (one state per replicate), losses from ``losses.pairwise``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import utils
from bandits.adapter import Pattern
from bandits.linear import NUM_GROUPS, HeldOutStates, Pairs
from losses.pairwise import DPO, IPO, PairwiseLoss
from losses.types import Scored
from utils import UserError
from weighting import GroupRobust, ImportanceWeighted, Uniform

GROUP_NAMES = tuple(f"group_{g}" for g in range(NUM_GROUPS))


@dataclass(frozen=True)
class GroupArm:
    """One curve.

    loss         dpo | ipo, with ``beta``
    weighting    uniform | importance (every group's mean loss counts the same) | robust (exponentiated gradient)
    solver       gradient: ``iterations`` full-batch steps of size ``lr`` | closed_form: ipo only, ``iterations`` updates of
                 the group weights, each followed by the exact weighted least-squares solution
    step_size    eta of the robust weights; ``chi`` in [0, 1]: 0 is importance sampling, 1 fully robust
    ridge        ridge |theta|^2 is added to the objective of either solver
    logps        linear: scores <phi, theta> | log: normalised log-probs over all actions (the same margin)
    closed_form_weights  mean: W = alpha_g / N_g, so alpha weighs group means | example: W = alpha_g, Algorithm 2 as printed
    group_loss   mean | divided_twice: the published code's mean divided by N_g once more, kept to show what it does
    """

    label: str
    loss: Literal["dpo", "ipo"]
    beta: float
    weighting: Literal["uniform", "importance", "robust"] = "uniform"
    solver: Literal["gradient", "closed_form"] = "gradient"
    iterations: int = 1
    lr: float = 0.9
    step_size: float = 0.01
    chi: float = 1.0
    ridge: float = 0.0
    logps: Literal["linear", "log"] = "linear"
    closed_form_weights: Literal["mean", "example"] = "mean"
    group_loss: Literal["mean", "divided_twice"] = "mean"
    param_limit: float = 5.0

    def __post_init__(self) -> None:
        if self.solver == "closed_form" and self.loss != "ipo":
            raise UserError(f"arm {self.label!r}: solver=closed_form exists for loss=ipo only")
        if self.iterations < 1:
            raise UserError(f"arm {self.label!r}: iterations={self.iterations}: must be at least 1")

    def pairwise(self) -> PairwiseLoss:
        """The loss object."""
        return DPO(beta=self.beta) if self.loss == "dpo" else IPO(beta=self.beta)

    def weights(self, counts: Sequence[int], num: int) -> list:
        """One weighting state per replicate."""
        probs = [n / sum(counts) for n in counts]
        settings = {
            "uniform": Uniform(),
            "importance": ImportanceWeighted(),
            "robust": GroupRobust(step_size=self.step_size, chi=self.chi),
        }[self.weighting]
        return [settings.build(GROUP_NAMES, counts, probs) for _ in range(num)]


@dataclass
class GroupCurves:
    """Metrics name -> (len(steps), R), and the final parameters (R, F)."""

    steps: list[int]
    metrics: dict[str, Tensor]
    theta: Tensor


def group_shares(states: Sequence) -> Tensor:
    """(R, G) float64: what each group's mean loss counts in each replicate's objective."""
    rows = []
    for state in states:
        values = state.metrics()
        rows.append([values[f"weights/{name}"] for name in GROUP_NAMES])
    return torch.tensor(rows, dtype=torch.float64)


def update_weights(states: Sequence, group_means: Tensor, counts: Sequence[int]) -> None:
    """One ascent step of every replicate on the (R, G) group mean losses of the full batch."""
    sums = group_means.detach().numpy() * np.asarray(counts)
    for state, row in zip(states, sums, strict=True):
        state.update(row, counts, sum(counts))


def measure(
    theta: Tensor, arm: GroupArm, train: Pairs, validation: Pairs, test: HeldOutStates
) -> dict[str, Tensor]:
    """(R,) metrics of the policy: losses and reward errors per group, worst and mean."""
    link = arm.pairwise().link
    per_group = test.of_policy(theta)
    for name, pairs in (("train_loss", train), ("val_loss", validation)):
        per_group[name] = pairs.group_means(link(torch.einsum("rnf,rf->rn", pairs.difference, theta)))
    out = {}
    for name, values in per_group.items():
        out |= {f"{name}/{g}": values[:, i] for i, g in enumerate(GROUP_NAMES)}
        out |= {f"{name}/worst_group": values.max(1).values, f"{name}/mean_group": values.mean(1)}
    return out


def _scores(arm: GroupArm, theta: Tensor, pairs: Pairs, fixed: tuple[Tensor, Tensor]) -> Tensor:
    """(R * N, 2) policy log-probs of chosen and rejected, up to a constant per pair when ``logps`` is linear."""
    if arm.logps == "linear":
        both = [torch.einsum("rnf,rf->rn", phi, theta) for phi in fixed]
    else:
        logps = torch.einsum("rnaf,rf->rna", pairs.features, theta).log_softmax(-1)
        both = [logps.gather(-1, a.unsqueeze(-1)).squeeze(-1) for a in (pairs.chosen, pairs.rejected)]
    return torch.stack(both, -1).flatten(0, 1)


def train_gradient(
    arm: GroupArm, train: Pairs, validation: Pairs, test: HeldOutStates, seeds: Sequence[int], eval_every: int
) -> GroupCurves:
    """Full-batch gradient descent; step 0 is the random start theta ~ U(0, param_limit)^F."""
    loss, (r, n) = arm.pairwise(), train.chosen.shape
    starts = [
        utils.stream(s, "linear/theta").uniform(0, arm.param_limit, train.features.shape[-1]) for s in seeds
    ]
    theta = torch.from_numpy(np.stack(starts)).requires_grad_(True)
    states = arm.weights(train.counts, r)
    pattern = Pattern(("chosen", "rejected"), r * n)
    uniform = torch.full((r * n, 2), -np.log(train.features.shape[2]), dtype=torch.float64)
    reference: Scored = pattern.scored(uniform)
    batch, fixed = pattern.batch(), (train.of(train.chosen), train.of(train.rejected))
    groups = torch.arange(NUM_GROUPS)
    curves, rows = GroupCurves([], {}, theta), defaultdict(list)
    for step in range(arm.iterations + 1):
        losses = loss(pattern.scored(_scores(arm, theta, train, fixed)), reference, batch).losses.view(r, n)
        means = train.group_means(losses)  # (R, G)
        # an example counts weight_g; a group's mean loss counts weight_g N_g / N
        per_group = torch.stack([s.weights(groups, train.counts, n) for s in states])
        objective = (per_group * means * torch.tensor(train.counts) / n).sum(1)
        objective = objective + arm.ridge * theta.square().sum(1)
        (gradient,) = torch.autograd.grad(objective.sum(), theta)
        if step % eval_every == 0 or step == arm.iterations:
            _record(curves, rows, step, arm, theta.detach(), states, train, validation, test)
            rows["grad_norm"].append(gradient.norm(dim=1))
        if step < arm.iterations:
            with torch.no_grad():
                theta -= arm.lr * gradient
            update_weights(states, means, train.counts)
    curves.metrics = {name: torch.stack(values) for name, values in rows.items()}
    curves.theta = theta.detach()
    return curves


def closed_form(shares: Tensor, train: Pairs, beta: float, ridge: float, per_example: bool = False) -> Tensor:
    """(R, F) minimiser of sum_g a_g (mean of group g's (h - 1/(2 beta))^2) + ridge |theta|^2.

    ``shares`` (R, G) are a_g; with ``per_example`` they multiply the group's sum instead of its mean (W = alpha_g).
    """
    difference = train.difference
    scale = shares if per_example else shares / torch.tensor(train.counts)
    w = scale[:, train.group]  # (R, N)
    gram = torch.einsum("rn,rnf,rnk->rfk", w, difference, difference)
    gram = gram + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype)
    return torch.linalg.solve(gram, torch.einsum("rn,rnf->rf", w, difference)) / (2 * beta)


def train_closed_form(
    arm: GroupArm, train: Pairs, validation: Pairs, test: HeldOutStates, seeds: Sequence[int], eval_every: int
) -> GroupCurves:
    """Alternate exponentiated-gradient steps on the group weights with the exact weighted solution (Algorithm 2)."""
    link, r = arm.pairwise().link, len(seeds)
    states, difference = arm.weights(train.counts, r), train.difference
    curves, rows = GroupCurves([], {}, torch.empty(0)), defaultdict(list)
    per_example = arm.closed_form_weights == "example"
    for step in range(arm.iterations + 1):
        theta = closed_form(group_shares(states), train, arm.beta, arm.ridge, per_example)
        if step % eval_every == 0 or step == arm.iterations:
            _record(curves, rows, step, arm, theta, states, train, validation, test)
        means = train.group_means(link(torch.einsum("rnf,rf->rn", difference, theta)))
        if arm.group_loss == "divided_twice":
            means = means / torch.tensor(train.counts)
        if step < arm.iterations:
            update_weights(states, means, train.counts)
    curves.metrics = {name: torch.stack(values) for name, values in rows.items()}
    curves.theta = theta
    return curves


def _record(curves, rows, step, arm, theta, states, train, validation, test) -> None:
    curves.steps.append(step)
    measured = measure(theta, arm, train, validation, test)
    shares = group_shares(states)
    measured |= {f"weights/{name}": shares[:, g] for g, name in enumerate(GROUP_NAMES)}
    for name, value in measured.items():
        rows[name].append(value)


def mle_reward(train: Pairs, ridge: float = 1e-3, iterations: int = 50) -> Tensor:
    """(R, F) Bradley-Terry maximum likelihood of one reward for all groups, by Newton's method.

    Minimises mean softplus(-<d, w>) + ridge/2 |w|^2; the ridge keeps separable data finite. Up to its scale (1 / beta)
    this is also what DPO converges to.
    """
    d = train.difference
    w = torch.zeros(d.shape[0], d.shape[2], dtype=d.dtype)
    eye = ridge * torch.eye(d.shape[2], dtype=d.dtype)
    for _ in range(iterations):
        p = torch.sigmoid(-torch.einsum("rnf,rf->rn", d, w))
        gradient = -torch.einsum("rn,rnf->rf", p, d) / d.shape[1] + ridge * w
        hessian = torch.einsum("rn,rnf,rnk->rfk", p * (1 - p), d, d) / d.shape[1] + eye
        w = w - torch.linalg.solve(hessian, gradient)
    return w
