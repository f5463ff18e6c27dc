"""From an arm's settings to a loss, and from sampled responses with rewards to the batch that loss takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from bandits.adapter import Pattern
from bandits.negatives import BestOfNNegative
from data.schema import Batch
from losses.pairwise import DPO, IPO
from losses.policy import PPO, Reinforce, RewardWeighted
from losses.sft import SFT
from losses.types import Loss
from utils import UserError

Method = Literal["best_of_n", "best_of_n_negative", "dpo", "ipo", "rwr", "reinforce", "ppo"]
Advantage = Literal["raw", "batch_mean", "prompt_mean", "prompt_std", "leave_one_out", "running"]


@dataclass(frozen=True)
class Arm:
    """One curve: a method and how much of its data is on-policy.

    epochs rounds of sampling; in each, ``samples`` responses for each of ``prompts`` prompts, then ``reuse`` passes of
    ``minibatches`` gradient steps each: epochs * reuse * minibatches steps in all, epochs * prompts * samples reward
    queries. ``epochs: 1`` is offline.

    label          name in tables and figures
    lr             Adam's; null: tuned by the study
    fresh_prompts  new prompts at every epoch (the published code keeps the first ones)
    margin         ipo: target of the margin in nats; IPO's own beta is 1 / (2 margin)
    beta           dpo: per nat
    threshold      dpo, ipo: pairs whose rewards differ by less are dropped
    temperature    rwr: units of reward; ``standardise`` divides the reward by its spread within the prompt first
    advantage      reinforce, ppo; ``positive_only`` subtracts the smallest advantage, so no response is pushed down
    negatives      best_of_n_negative: worst | sum | average | complement, with ``coef``, ``guard``, ``constrained``
    max_grad_norm  per replicate; null: none
    """

    label: str
    method: Method
    lr: float | None = None
    epochs: int = 1
    reuse: int = 200
    minibatches: int = 1
    prompts: int = 10
    samples: int = 10
    fresh_prompts: bool = False
    margin: float = 10.0
    beta: float = 0.1
    threshold: float = 0.0
    temperature: float = 0.1
    standardise: bool = False
    max_weight: float | None = None
    advantage: Advantage = "prompt_std"
    positive_only: bool = False
    clip: float = 0.2
    kl_coef: float = 0.0
    negatives: Literal["worst", "sum", "average", "complement"] = "sum"
    coef: float = 0.1
    guard: float = 0.01
    constrained: bool = False
    max_grad_norm: float | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "reuse", "minibatches", "prompts"):
            if getattr(self, name) < 1:
                raise UserError(f"arm {self.label!r}: {name}={getattr(self, name)}: must be at least 1")
        compares = self.method in ("best_of_n_negative", "dpo", "ipo")
        if self.samples < (2 if compares else 1):
            raise UserError(f"arm {self.label!r}: samples={self.samples}: {self.method} needs at least 2")
        if self.prompts % self.minibatches:
            raise UserError(
                f"arm {self.label!r}: minibatches={self.minibatches} does not divide prompts={self.prompts}"
            )
        if self.margin <= 0:
            raise UserError(f"arm {self.label!r}: margin={self.margin}: must be > 0; try margin=10")
        self.loss()  # refuses bad values now, not after the arms before it have run

    @property
    def steps(self) -> int:
        """Gradient steps in all."""
        return self.epochs * self.reuse * self.minibatches

    @property
    def regime(self) -> str:
        """offline: all data drawn before the first step."""
        return "offline" if self.epochs == 1 else "on-policy"

    def loss(self) -> Loss:
        """The loss object; raises UserError for values it refuses."""
        makers: dict[str, Callable[[], Loss]] = {
            "best_of_n": SFT,
            "best_of_n_negative": lambda: BestOfNNegative(
                self.coef,
                "sum" if self.negatives == "worst" else self.negatives,
                self.guard,
                self.constrained,
            ),
            "dpo": lambda: DPO(beta=self.beta),
            "ipo": lambda: IPO(beta=1 / (2 * self.margin)),
            "rwr": lambda: RewardWeighted(self.temperature, self.max_weight),
            "reinforce": lambda: Reinforce(self.kl_coef),
            "ppo": lambda: PPO(clip=self.clip, kl_coef=self.kl_coef),
        }
        return makers[self.method]()


@dataclass(frozen=True)
class Selection:
    """The examples of one gradient step.

    pattern    roles of the B examples
    pick       (B, P) index of each response among the flattened (R, S, N) samples
    replicate  (B,) whose example it is
    weight     (B,) 1 / examples of that replicate: the weighted sum of losses is a sum of means over replicates
    """

    pattern: Pattern
    pick: Tensor
    replicate: Tensor
    weight: Tensor
    batch: Batch


@dataclass
class RunningMoments:
    """Mean and spread of all rewards seen so far, per replicate, each sample counted once and itself included."""

    count: float = 0.0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))
    square: Tensor = field(default_factory=lambda: torch.zeros(()))

    def normalise(self, rewards: Tensor) -> Tensor:
        """(R, n) rewards in the order they were seen -> (R, n) normalised; the first ever is 0."""
        n = torch.arange(1, rewards.shape[1] + 1, dtype=rewards.dtype) + self.count
        total = self.total + rewards.cumsum(1)
        square = self.square + rewards.square().cumsum(1)
        mean = total / n
        spread = (square / n - mean.square()).clamp(min=0).sqrt()
        self.count, self.total, self.square = float(n[-1]), total[:, -1:], square[:, -1:]
        return _standard(rewards, mean, spread)


def _standard(rewards: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """(r - mean) / spread, and 0 where all rewards are equal (a spread below 1e-9 is rounding)."""
    return torch.where(spread > 1e-9, (rewards - mean) / spread.clamp(min=1e-9), 0.0)


def advantages(rewards: Tensor, kind: str, positive_only: bool, moments: RunningMoments) -> Tensor:
    """(R, S, N) rewards -> advantages of the same shape."""
    r, s, n = rewards.shape
    mean = rewards.mean(-1, keepdim=True)
    if kind == "raw":
        out = rewards
    elif kind == "batch_mean":
        out = rewards - rewards.mean((1, 2), keepdim=True)
    elif kind == "prompt_mean":
        out = rewards - mean
    elif kind == "prompt_std":
        out = _standard(rewards, mean, rewards.std(-1, correction=0, keepdim=True))
    elif kind == "leave_one_out":
        out = (rewards - mean) * n / max(n - 1, 1)
    else:
        out = moments.normalise(rewards.reshape(r, s * n)).view(r, s, n)
    return out - out.amin((1, 2), keepdim=True) if positive_only else out


def _selection(
    pattern_roles: tuple[str, ...], pick: Tensor, per_replicate: int, num: int, **columns
) -> Selection:
    """``pick`` (B, P) with the same number of examples in each of ``num`` replicates, replicates in order."""
    pattern = Pattern(pattern_roles, pick.shape[0])
    replicate = torch.arange(num).repeat_interleave(per_replicate)
    weight = torch.full((pick.shape[0],), 1.0 / per_replicate)
    return Selection(pattern, pick, replicate, weight, pattern.batch(**columns))


def _pairs(arm: Arm, rewards: Tensor, flat: Tensor) -> Selection:
    """All N (N - 1) / 2 pairs of every prompt; equal rewards carry half a label each way."""
    r, _, n = rewards.shape
    i, j = torch.triu_indices(n, n, 1)
    gap = rewards[..., i] - rewards[..., j]  # (R, S, pairs)
    chosen = torch.where(gap >= 0, flat[..., i], flat[..., j])
    rejected = torch.where(gap >= 0, flat[..., j], flat[..., i])
    keep = gap.abs() >= arm.threshold
    pick = torch.stack((chosen[keep], rejected[keep]), -1)  # (B, 2)
    replicate = torch.arange(r).view(r, 1, 1).expand_as(keep)[keep]
    count = torch.bincount(
        replicate, minlength=r
    )  # a replicate may have lost all its pairs: it then takes no step
    pattern = Pattern(("chosen", "rejected"), pick.shape[0])
    label = torch.where(gap[keep] == 0, 0.5, 1.0)
    return Selection(
        pattern, pick, replicate, 1.0 / count[replicate], pattern.batch(scalars={"p_chosen": label})
    )


def _best(arm: Arm, rewards: Tensor, flat: Tensor) -> Selection:
    """The first of the best responses of every prompt, with the others where the method pushes them down."""
    r, s, n = rewards.shape
    best = rewards.argmax(-1, keepdim=True)  # (R, S, 1)
    chosen = flat.gather(-1, best).view(r * s, 1)
    if arm.method == "best_of_n":
        return _selection(("target",), chosen, s, r)
    if arm.negatives == "worst":
        others = rewards.argmin(-1, keepdim=True)
    else:  # every index but the best, in order
        others = torch.arange(n - 1).expand(r, s, -1)
        others = others + (others >= best)
    pick = torch.cat((chosen, flat.gather(-1, others).view(r * s, -1)), -1)
    worse = (rewards.gather(-1, others) < rewards.gather(-1, best)).view(r * s, -1).float()
    worse = torch.cat((torch.zeros(r * s, 1), worse), -1)
    roles = ("chosen",) + ("rejected",) * others.shape[-1]
    return _selection(roles, pick, s, r, response_scalars={"worse": worse})


def select(arm: Arm, rewards: Tensor, old_logps: Tensor, moments: RunningMoments) -> Selection:
    """The batch for one gradient step on (R, S, N) ``rewards``; ``old_logps`` (R, S, N, T) of the sampling policy."""
    r, s, n = rewards.shape
    flat = torch.arange(r * s * n).view(r, s, n)
    if arm.method in ("dpo", "ipo"):
        return _pairs(arm, rewards, flat)
    if arm.method in ("best_of_n", "best_of_n_negative"):
        return _best(arm, rewards, flat)
    if arm.method == "rwr":
        value = advantages(rewards, "prompt_std", False, moments) if arm.standardise else rewards
        scalars = {"reward": value.flatten()}
    else:
        scalars = {"advantage": advantages(rewards, arm.advantage, arm.positive_only, moments).flatten()}
    tokens = old_logps.reshape(r * s * n, 1, -1)
    if arm.method == "ppo":
        scalars["old_logps"] = tokens.sum((1, 2))
    return _selection(
        ("sample",), flat.view(-1, 1), s * n, r, scalars=scalars, token_scalars={"old_logps": tokens}
    )
