"""What the cones of a layer's units are worth measuring, and their volume or the reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_mnn.landscape.cone import predicted_samples
from lightning_mnn.landscape.pattern import ActivationPattern
from lightning_mnn.landscape.region import Region
from lightning_mnn.landscape.volume import RegionVolume, region_log_volume

if TYPE_CHECKING:
    from torch import Tensor

    VolumeOrReason = tuple[RegionVolume | None, str | None]

_MOST_SAMPLES = 2**20  # of a cone, however large the budget


class OverBudgetError(ValueError):
    """Too few cones could be measured within a budget."""


@dataclass(frozen=True)
class ConePlan:
    """How the cones of each of some networks' layers are measured.

    Attributes:
        target_standard_error: of one cone's log measure.
        num_units: how many cones of each layer; None: all.
        max_samples: most samples of each.
    """

    target_standard_error: float
    num_units: int | None
    max_samples: int

    @classmethod
    def within(
        cls, budget: float, target_standard_error: float, *, replicas: int, num_samples: int, width: int, dim: int
    ) -> ConePlan:
        """As many cones as a budget of multiplications allows, of each of ``replicas`` layers of (width, dim) weights.

        Raises:
            OverBudgetError: it does not allow two of each (one, where there is only one).
        """
        sweep = replicas * num_samples * dim  # multiplications of one in each replica
        samples = predicted_samples(dim, target_standard_error)
        num_units = int(min(width, budget / (sweep * samples)))
        least = min(2, width)
        if num_units < least:
            needed = f"{least} cones a network would take {least * sweep * samples:.1e} multiplications"
            raise OverBudgetError(f"{needed}, above the budget of {budget:.1e}")
        return cls(
            target_standard_error,
            num_units if num_units < width else None,
            int(min(_MOST_SAMPLES, budget / (sweep * num_units))),
        )

    def measure(self, inputs: Tensor, rows: Tensor, seed: int) -> VolumeOrReason:
        """The volume of the region of rows (d1, d0) on inputs (N, d0), or why there is none.

        What is no reason to end the training is a reason here.
        """
        try:
            volume = region_log_volume(
                Region(inputs, ActivationPattern.from_preactivations(inputs @ rows.mT)),
                rows,
                target_standard_error=self.target_standard_error,
                num_units=self.num_units,
                max_samples=self.max_samples,
                seed=seed,
            )
        except (ValueError, ArithmeticError) as error:
            return None, str(error)
        return volume, None
