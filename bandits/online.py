"""Algorithm 1 of Tajwar et al. 2024: sample, label, take gradient steps, repeat; every seed of an arm at once."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from bandits.methods import Arm, RunningMoments, Selection, select
from bandits.policies import Params, trainable
from bandits.worlds import World
from losses.types import Loss


@dataclass
class Curves:
    """What was measured after ``steps`` gradient steps and ``queries`` reward queries: metrics name -> (len(steps), R)."""

    steps: list[int]
    queries: list[int]
    metrics: dict[str, Tensor]

    def last(self, metric: str) -> Tensor:
        """(R,) final value."""
        return self.metrics[metric][-1]


@dataclass(frozen=True)
class Samples:
    """Prompts with their responses, rewards, and log-probs under the policy that drew them and under the reference."""

    prompts: Tensor  # (R, S) or (R, S, D)
    actions: Tensor  # (R, S, N, ...)
    rewards: Tensor  # (R, S, N)
    old: Tensor  # (R, S, N, T)
    reference: Tensor  # (R, S, N, T)

    def chunk(self, index: int, num: int) -> Samples:
        """The ``index``-th of ``num`` equal parts of the prompts."""
        width = self.prompts.shape[1] // num
        part = slice(index * width, (index + 1) * width)
        return Samples(
            *(x[:, part] for x in (self.prompts, self.actions, self.rewards, self.old, self.reference))
        )


def draw(world: World, params: Params, prompts: Tensor, num: int, first: bool) -> Samples:
    """``num`` responses per prompt, rewarded and scored."""
    actions = (world.first_actions if first else world.sample)(params, prompts, num)
    with torch.no_grad():
        reference = world.reference_token_logps(prompts, actions)
        old = world.token_logps(params, prompts, actions)
    return Samples(prompts, actions, world.rewards(prompts, actions), old, reference)


def step_loss(world: World, params: Params, data: Samples, chosen: Selection, loss: Loss) -> Tensor:
    """(R,) mean loss of every replicate, with gradient."""
    tokens = world.token_logps(params, data.prompts, data.actions, training=True)  # (R, S, N, T)
    r, _, _, t = tokens.shape
    tokens = tokens.reshape(-1, t)
    needs = loss.needs
    picked = tokens[chosen.pick]  # (B, P, T)
    policy = chosen.pattern.scored(picked.sum(-1), picked if needs.tokens else None)
    reference = None
    if needs.reference:
        reference = chosen.pattern.scored(data.reference.reshape(-1, t).sum(-1)[chosen.pick])
    losses = loss(policy, reference, chosen.batch).losses
    return torch.zeros(r, dtype=losses.dtype).index_add(
        0, chosen.replicate, losses * chosen.weight.to(losses)
    )


def grad_norms(params: Params) -> Tensor:
    """(R,) Euclidean norm of each replicate's gradient."""
    return torch.stack([p.grad.flatten(1).square().sum(1) for p in params.values()]).sum(0).sqrt()


def clip_gradients(params: Params, limit: float) -> None:
    """Scale each replicate's gradient to at most ``limit``."""
    scale = (limit / (grad_norms(params) + 1e-12)).clamp(max=1.0)
    for p in params.values():
        p.grad.mul_(scale.view(-1, *[1] * (p.dim() - 1)))


@torch.no_grad()
def log_ratios(world: World, params: Params, data: Samples) -> dict[str, Tensor]:
    """(R,) mean log pi / pi_ref of the best sample of each prompt and of the others, and their difference, in nats."""
    h = (world.token_logps(params, data.prompts, data.actions) - data.reference).sum(-1)  # (R, S, N)
    best = data.rewards.argmax(-1, keepdim=True)
    chosen = h.gather(-1, best).squeeze(-1)
    rejected = (h.sum(-1) - chosen) / max(h.shape[-1] - 1, 1)
    return {
        "log_ratio/chosen": chosen.mean(-1),
        "log_ratio/rejected": rejected.mean(-1),
        "log_ratio/margin": (chosen - rejected).mean(-1),
    }


def train(world: World, arm: Arm, start: Params, prompts: Tensor, eval_every: int) -> Curves:
    """Run ``arm`` from ``start`` on ``prompts`` and evaluate every ``eval_every`` gradient steps and at the end.

    Step 0 is the state before training. ``eval_every`` counts gradient steps.
    """
    loss, params, moments = arm.loss(), trainable(start), RunningMoments()
    optimizer = torch.optim.Adam(list(params.values()), lr=arm.lr, fused=True)
    curves = Curves([], [], {})
    rows: dict[str, list[Tensor]] = defaultdict(list)
    step = queries = 0

    def record(data: Samples, train_loss: Tensor | None) -> None:
        curves.steps.append(step)
        curves.queries.append(queries)
        nothing = torch.full((data.rewards.shape[0],), float("nan"))
        measured = world.evaluate(params) | log_ratios(world, params, data)
        measured["train_loss"] = nothing if train_loss is None else train_loss.detach()
        measured["train_reward"] = data.rewards.mean((1, 2))
        measured["grad_norm"] = nothing if train_loss is None else grad_norms(params)
        for name, value in measured.items():
            rows[name].append(value.double())

    for epoch in range(arm.epochs):
        if epoch and arm.fresh_prompts:
            prompts = world.draw_prompts(arm.prompts)
        data = draw(world, params, prompts, arm.samples, first=epoch == 0)
        queries += arm.prompts * arm.samples
        if epoch == 0:
            record(data, None)
        parts = [data.chunk(i, arm.minibatches) for i in range(arm.minibatches)]
        batches = [(part, select(arm, part.rewards, part.old, moments)) for part in parts]
        for _ in range(arm.reuse):
            for part, chosen in batches:
                values = step_loss(world, params, part, chosen, loss)
                optimizer.zero_grad()
                values.sum().backward()
                if arm.max_grad_norm is not None:
                    clip_gradients(params, arm.max_grad_norm)
                optimizer.step()
                step += 1
                if step % eval_every == 0 or step == arm.steps:
                    record(data, values)
    curves.metrics = {name: torch.stack(values) for name, values in rows.items()}
    return curves
