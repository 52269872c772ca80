"""AngularVolumeMonitor: how large is the region that training is in, beside the paper's theorems?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override

from lightning_mnn.callbacks.schedule import Schedule, ScheduledCallback, plain
from lightning_mnn.callbacks.training_set import required_network, survey_training_set
from lightning_mnn.landscape import bounds
from lightning_mnn.landscape.volume import log_volume_bound_from_sines
from lightning_mnn.loggers import log_scalars

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch import Tensor


class AngularVolumeMonitor(ScheduledCallback):
    """Logs a rigorous lower bound on the log-volume of the current region, and the paper's theorems for the run.

    For networks with one hidden layer; with two, nothing is logged. ``volume/log_lower_bound`` is the sum over the
    units of the log measure of the spherical cap around w_i inside its cone (see
    :func:`lightning_mnn.landscape.log_volume_lower_bound`), the mean over replicas. Logged once, at the start:
    ``volume/theorem_6_suboptimal`` (upper bound on log E V(L_ε)), ``volume/theorem_8_width`` (sufficient width),
    ``volume/theorem_9_global`` (lower bound on log V(G)), ``volume/theorem_9_failure`` (its δ) and
    ``volume/theorem_10_ratio`` (upper bound on log V(L_ε)/V(G)).

    Args:
        schedule: when to log the bound, besides the start and the end; None: every 100 epochs.
        epsilon: least classification error of the minima that the theorems count.

    Attributes:
        log_lower_bound: the last bound, (...); None before training and for two hidden layers.

    Raises:
        ValueError: ``epsilon`` outside [0, 1].
        TypeError: (in setup) the module holds no network that can be judged.

    >>> AngularVolumeMonitor(epsilon=0.2).theorems(320, 40, 40, 0.0)["volume/theorem_8_width"]
    20.0
    """

    def __init__(self, schedule: Schedule | None = None, epsilon: float = 0.1) -> None:
        super().__init__(schedule or Schedule(every=100))
        if not 0 <= epsilon <= 1:
            raise ValueError(f"epsilon must lie between 0 and 1, got {epsilon}")
        self.epsilon = epsilon
        self.log_lower_bound: Tensor | None = None

    def theorems(
        self, num_samples: int, input_dim: int, width: int, negative_slope: float
    ) -> dict[str, Tensor | float | None]:
        """Theorems 6, 8, 9 and 10 at the given sizes, by logged name; None where a theorem does not apply."""
        sizes = (num_samples, input_dim, width)
        wide = width >= 2 * num_samples / input_dim  # d1* of Theorem 9
        return {
            "volume/theorem_6_suboptimal": float(bounds.suboptimal_log_volume(*sizes, self.epsilon, negative_slope)),
            "volume/theorem_8_width": float(bounds.sufficient_width(*sizes[:2])) if input_dim > 1 else None,
            "volume/theorem_9_global": float(bounds.global_log_volume(*sizes)) if wide else None,
            "volume/theorem_9_failure": float(bounds.global_failure_probability(*sizes[:2])) if wide else None,
            "volume/theorem_10_ratio": float(bounds.log_volume_ratio(*sizes, self.epsilon, negative_slope)),
        }

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            required_network(self, pl_module)
            self.log_lower_bound = None

    @override
    def act(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        network = required_network(self, pl_module)
        if len(network.hidden_weights) > 1:
            return
        survey = survey_training_set(trainer, pl_module)
        self.log_lower_bound = log_volume_bound_from_sines(survey.layers[0].smallest_sines, network.rows.shape[-1])
        scalars: dict[str, Tensor | float | None] = {"volume/log_lower_bound": self.log_lower_bound}
        biased = network.hidden_bias is not None or network.output_bias is not None
        if trainer.global_step == 0 and not biased:  # which the theorems do not know
            scalars |= self.theorems(
                survey.num_samples, network.input_dim, network.hidden_dims[0], network.negative_slope
            )
        log_scalars(trainer, scalars)

    @override
    def summary(self) -> dict[str, Any]:
        return {
            "log_volume": None,
            "log_volume_standard_error": None,
            "log_volume_lower_bound": plain(self.log_lower_bound),
        }
