"""The auxiliary pairs of a micro-batch: any number M per example, with the preferences of the auxiliary model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data.schema import Batch
from losses.types import Scored
from utils import UserError

AUX = ("aux_1", "aux_2")
PREFERENCES = ("chosen_preference", "aux_preference")


@dataclass(frozen=True)
class AuxPairs:
    """The A auxiliary pairs of a micro-batch of B examples.

    first, second    (A,) positions of aux_1 and aux_2 among the scored responses
    example          (A,) the example of each pair
    preference       (A,) g*, the probability that aux_1 is preferred
    data_preference  (B,) g, the probability that chosen is preferred; 1/2 (unused) where an example has no pair
    count            (B,) M
    """

    first: Tensor
    second: Tensor
    example: Tensor
    preference: Tensor
    data_preference: Tensor
    count: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """(A,) -> (B,) mean over each example's pairs; 0 where it has none."""
        total = torch.zeros_like(self.count, dtype=values.dtype).index_add(0, self.example, values)
        return total / self.count.clamp(min=1)

    def mean_of_responses(self, values: Tensor) -> Tensor:
        """(S,) of all scored responses -> (B,) mean over each example's 2M auxiliary ones; NaN where it has none."""
        mean = self.mean((values[self.first] + values[self.second]) / 2)
        return torch.where(self.count > 0, mean, torch.nan)


def aux_pairs(policy: Scored, batch: Batch, like: Tensor) -> AuxPairs:
    """Read and check the auxiliary pairs. Raises UserError (row named) for unpaired responses and bad preferences."""
    where = batch.positions(["aux_1"])
    count, other = (
        torch.bincount(batch.example[batch.positions([role])], minlength=len(batch)) for role in AUX
    )
    for i in torch.nonzero(count != other).flatten().tolist():
        raise UserError(
            f"{batch.uids[i]}: {int(count[i])} aux_1 but {int(other[i])} aux_2 responses; every aux_1 needs its aux_2"
        )
    g = batch.scalars.get("chosen_preference", torch.full((len(batch),), torch.nan))
    g_aux = batch.response_scalars.get("aux_preference", torch.full((len(batch.roles),), torch.nan))[where]
    owner = batch.example[where]
    for name, values, examples in (
        ("chosen_preference", g[count > 0], torch.nonzero(count > 0).flatten()),
        ("aux_preference", g_aux, owner),
    ):
        for i in torch.nonzero(~((values >= 0) & (values <= 1))).flatten().tolist():
            raise UserError(
                f"{batch.uids[examples[i]]}: {name}={float(values[i])}: an example with auxiliary responses needs a "
                "probability in [0, 1] here; add the column with commands.annotate"
            )
    return AuxPairs(
        first=policy.index("aux_1"),
        second=policy.index("aux_2"),
        example=owner.to(like.device, non_blocking=True),
        preference=g_aux.detach().to(like, non_blocking=True),
        data_preference=torch.where(count > 0, g, 0.5).detach().to(like, non_blocking=True),
        count=count.to(like.device, non_blocking=True),
    )
