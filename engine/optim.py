"""Optimizers by name, their state as flat tensors, the learning rate as a function of the step, gradient clipping."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint import place
from utils import UserError, did_you_mean

UNUSABLE = {
    "LBFGS": "it re-evaluates the loss inside a step",
    "SparseAdam": "it wants sparse gradients",
}


def optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    """Every optimizer of torch.optim that can take one step per batch."""
    return {
        name: cls
        for name, cls in vars(torch.optim).items()
        if inspect.isclass(cls)
        and issubclass(cls, torch.optim.Optimizer)
        and cls is not torch.optim.Optimizer
        and name not in UNUSABLE
    }


def build_optimizer(
    name: str,
    params: Iterable[Tensor],
    *,
    lr: float,
    weight_decay: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> torch.optim.Optimizer:
    """``torch.optim.<name>`` over the parameters that want a gradient, fused where torch has a fused kernel.

    weight_decay, options  as for `optimizer_arguments`
    """
    cls, arguments = optimizer_arguments(name, weight_decay, options)
    trained = [p for p in params if p.requires_grad]
    if not trained:
        raise UserError("no parameter of the model is trained; check model.lora and what is frozen")
    chooses = any(arguments.get(key) for key in ("foreach", "capturable", "differentiable"))
    if (
        "fused" in inspect.signature(cls).parameters
        and "fused" not in arguments
        and not chooses
        and _fusable(name, trained)
    ):
        arguments["fused"] = True
    try:
        return cls(trained, lr=lr, **arguments)
    except (
        ValueError,
        RuntimeError,
    ) as error:  # of optimizers that look at the parameters: Muon, fused, capturable
        raise UserError(f"optimizer={name} {arguments}: {error}") from error


def optimizer_arguments(
    name: str, weight_decay: float | None, options: Mapping[str, Any] | None
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """(``torch.optim.<name>``, its arguments besides the parameters and the rate). Raises UserError for what it does not have.

    weight_decay  None: the optimizer's own default (0.01 for AdamW)
    options       further arguments (``optimizer_options.betas=[0.9,0.95]``); lists become tuples
    """
    if name in UNUSABLE:
        raise UserError(f"optimizer={name}: cannot be used here, {UNUSABLE[name]}; try optimizer=AdamW")
    known = optimizers()
    if name not in known:
        raise UserError(
            f"optimizer={name}: not in torch.optim{did_you_mean(name, known)}; known: {', '.join(known)}"
        )
    cls = known[name]
    accepted = set(inspect.signature(cls).parameters) - {"params", "lr", "weight_decay"}
    arguments: dict[str, Any] = {}
    for key, value in (options or {}).items():
        if key not in accepted:
            raise UserError(
                f"optimizer_options.{key}: {name} has no such argument{did_you_mean(key, accepted)}; "
                f"it has {', '.join(sorted(accepted))}"
            )
        arguments[key] = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
    if weight_decay is not None:
        if "weight_decay" in inspect.signature(cls).parameters:
            arguments["weight_decay"] = weight_decay
        elif weight_decay != 0:
            raise UserError(
                f"weight_decay={weight_decay}: {name} has none; use weight_decay=0 or optimizer=AdamW"
            )
    try:
        cls([torch.zeros(1, 1, requires_grad=True)], **arguments)
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(f"optimizer={name} optimizer_options={dict(options or {})}: {error}") from error
    return cls, arguments


def _fusable(name: str, params: Sequence[Tensor]) -> bool:
    sharded = any(hasattr(p, "full_tensor") for p in params)
    if sharded and name not in ("Adam", "AdamW"):  # torch 2.13 shards no other fused kernel
        return False
    return all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in params)


def clip_gradients(params: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale all gradients so that their joint 2-norm is at most ``max_norm`` (None: leave them); () the norm before.

    Works for sharded gradients: the norm is that of the whole. It stays on the gradients' device: nothing waits for it. A
    norm that is not finite is returned as it is, and the gradients are then good for nothing: check it before the
    optimizer steps.
    """
    params = [p for p in params if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    # on the CPU looking is free, and a pass over all gradients is not
    if max_norm is not None and not (whole.device.type == "cpu" and whole <= max_norm):
        torch.nn.utils.clip_grads_with_norm_(params, max_norm, norm)
    return whole.detach()


@dataclass
class Schedule:
    """Linear warm-up, then ``constant``, ``linear`` or ``cosine`` (to zero), times a scale that the stopper cuts.

    A pure function of the step and the scale, so the scale is all there is to save.

    lr            peak learning rate
    warmup_steps  the step with index t < warmup_steps runs at lr (t + 1) / (warmup_steps + 1)
    total_steps   optimizer steps of the run: where the decay ends
    """

    lr: float
    warmup_steps: int
    total_steps: int
    decay: str = "constant"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.decay not in ("constant", "linear", "cosine"):
            raise UserError(
                f"lr_schedule={self.decay}: must be constant, linear or cosine"
                f"{did_you_mean(self.decay, ('constant', 'linear', 'cosine'))}"
            )
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise UserError(f"lr={self.lr}: must be > 0")
        if self.warmup_steps < 0:
            raise UserError(f"warmup_steps={self.warmup_steps}: must be >= 0")
        if self.decay != "constant" and self.warmup_steps >= self.total_steps:
            raise UserError(
                f"warmup_steps={self.warmup_steps}: the run has {self.total_steps} steps, none is left for "
                f"lr_schedule={self.decay}; use fewer"
            )

    def factor(self, step: int) -> float:
        """In (0, 1]: the step with index ``step`` (0-based) runs at lr * factor * scale."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.decay == "constant":
            return 1.0
        done = min((step - self.warmup_steps) / (self.total_steps - self.warmup_steps), 1.0)
        return 1.0 - done if self.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    def set(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Give every parameter group the learning rate of ``step``, and return it."""
        lr = self.lr * self.factor(step) * self.scale
        for group in optimizer.param_groups:
            group["lr"] = lr
        return lr

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.scale = state["scale"]


# ---------------------------------------------------------------------------------------------------- state


def optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]],
    *,
    gather: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of any torch.optim optimizer: ({"<parameter>//<slot>": tensor}, JSON with scalars and groups).

    ``gather`` turns a sharded tensor into the full one; it is called in the same order on every rank.
    Raises TypeError for state that is neither a tensor nor a plain scalar (LBFGS keeps lists).
    """
    names = _names(optimizer, named_parameters)
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for slot, value in sorted(optimizer.state.get(parameter, {}).items()):
                key = f"{names[parameter]}//{slot}"
                if isinstance(value, Tensor):
                    tensors[key] = gather(value.detach())
                elif value is None or isinstance(value, bool | int | float):
                    scalars[key] = value
                else:
                    raise TypeError(
                        f"{type(optimizer).__name__} state {key}: cannot save a {type(value).__name__}"
                    )
    groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    return tensors, {"class": type(optimizer).__name__, "groups": groups, "scalars": scalars}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]],
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
) -> None:
    """Put the state back, bit-equal: unlike ``Optimizer.load_state_dict`` nothing is cast to the parameter's dtype.

    Full tensors (the same on every rank) go to where their parameter lives, sharded like it; sharded ones are there.
    Learning rate, weight decay and the like stay as configured: the schedule and the config own them.
    Raises ValueError when the optimizer or its parameters are not those that were saved.
    """
    names = _names(optimizer, named_parameters)
    if meta["class"] != type(optimizer).__name__:
        raise ValueError(f"optimizer={type(optimizer).__name__}: the checkpoint holds {meta['class']} state")
    groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    if groups != meta["groups"]:
        difference = sorted(set(chain(*groups)) ^ set(chain(*meta["groups"])))
        raise ValueError(
            f"trained parameters differ from the checkpoint's: {difference[:5] if difference else 'their order'}"
        )
    state: dict[str, dict[str, Any]] = {}
    for key, value in {**tensors, **meta["scalars"]}.items():
        name, _, slot = key.rpartition("//")
        state.setdefault(name, {})[slot] = value
    optimizer.state.clear()
    for group in optimizer.param_groups:
        # torch 2.13 keeps the counter ``step`` on the CPU unless the kernel that reads it runs on the device
        device_step = bool(group.get("fused")) or bool(group.get("capturable"))
        for parameter in group["params"]:
            slots = state.pop(names[parameter], {})
            for slot, value in slots.items():
                if isinstance(value, Tensor) and slot == "step":
                    value = value.to(parameter.device if device_step else "cpu", copy=True)
                elif isinstance(value, Tensor):
                    value = place(value, parameter)
                optimizer.state[parameter][slot] = value
    if state:
        raise ValueError(f"optimizer state for unknown parameters: {sorted(state)[:5]}")


def _names(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, Tensor]]) -> dict[Tensor, str]:
    names = {parameter: name for name, parameter in named}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter not in names:
                raise ValueError(
                    f"the optimizer holds a parameter of shape {tuple(parameter.shape)} without a name"
                )
    return names
