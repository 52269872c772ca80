"""LocalMinimumDetector: has training converged to a differentiable local minimum?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from typing_extensions import override

from lightning_mnn.callbacks.schedule import Schedule, ScheduledCallback, plain
from lightning_mnn.callbacks.training_set import input_rank, required_network, survey_training_set
from lightning_mnn.data.shards import exact_shard, flat_batch
from lightning_mnn.landscape.minimum import FirstOrderVerdict, Kind, first_order_verdicts
from lightning_mnn.landscape.region import Region
from lightning_mnn.landscape.survey import Network, Survey, rank_cap
from lightning_mnn.loggers import log_scalars

if TYPE_CHECKING:
    import pytorch_lightning as pl
    from torch import Tensor

_RANK_OPERATIONS = 2e10  # about what a processor does in a few seconds


class LocalMinimumDetector(ScheduledCallback):
    """Tests whether the weights are a differentiable local minimum, and stops training when they are.

    Each check is one exact pass over the whole training set in float64. The weights pass when ‖G e‖ is zero relative to
    ‖G‖‖y‖ and no pre-activation is zero relative to ‖w‖‖x‖, both within tolerances. These are first-order tests: they
    hold near a differentiable minimum, and ``differentiable_minimum`` means that they hold.

    Logs ``minimum/mse``, ``minimum/mce``, ``minimum/stationarity``, ``minimum/min_preactivation`` (absolute),
    ``minimum/relative_preactivation``, ``minimum/kinks`` and, with one hidden layer, ``minimum/rank_cap``: means over
    the replicas.

    Args:
        schedule: when to check, besides the start and the end; None: every 50 epochs.
        patience: consecutive checks that every replica must pass before training counts as converged.
        stop_training: stop the Trainer then.
        stationarity_tolerance: largest ‖G e‖/(‖G‖_F ‖y‖) that counts as zero; None: 10 times the spacing of floats at 1
            in the weights' precision.
        preactivation_tolerance: smallest |w·x|/(‖w‖‖x‖) that counts as off the kink; None: 1,000 times that spacing,
            so that the weights may still move a hundred times as far as the first test lets them before they reach it.

    Attributes:
        verdicts: the last check's verdicts, one a replica.
        survey: the last check's pass.
        converged: whether training counts as converged.

    Raises:
        ValueError: ``patience`` < 1.
        TypeError: (in setup) the module holds no network that can be judged.

    >>> LocalMinimumDetector(Schedule(every=100), patience=2).converged
    False
    """

    def __init__(
        self,
        schedule: Schedule | None = None,
        patience: int = 3,
        *,
        stop_training: bool = True,
        stationarity_tolerance: float | None = None,
        preactivation_tolerance: float | None = None,
    ) -> None:
        super().__init__(schedule or Schedule(every=50))
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience}")
        self.patience = patience
        self.stop_training = stop_training
        self.stationarity_tolerance = stationarity_tolerance
        self.preactivation_tolerance = preactivation_tolerance
        self.verdicts: list[FirstOrderVerdict] = []
        self.survey: Survey | None = None
        self.converged = False
        self._passed = 0
        self._ranks: int | list[int] | None = None
        self._rank_cap: Tensor | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            required_network(self, pl_module)
            self._passed, self.converged = 0, False

    @override
    def act(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        network = required_network(self, pl_module)
        self.survey = survey_training_set(trainer, pl_module)
        spacing = 2 * network.unit_roundoff
        self.verdicts = first_order_verdicts(
            self.survey,
            10 * spacing if self.stationarity_tolerance is None else self.stationarity_tolerance,
            1000 * spacing if self.preactivation_tolerance is None else self.preactivation_tolerance,
        )
        if len(network.hidden_weights) == 1:
            self._rank_cap = rank_cap(self.survey, input_rank(trainer, pl_module, network), network.negative_slope)
        self._log(trainer, self.survey)
        passed = all(verdict.kind is Kind.DIFFERENTIABLE_MINIMUM for verdict in self.verdicts)
        self._passed = self._passed + 1 if passed else 0
        self.converged = trainer.strategy.reduce_boolean_decision(self._passed >= self.patience, all=True)
        if self.converged and self.stop_training:
            trainer.should_stop = True

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        assert self.survey is not None  # noqa: S101 (the end has been surveyed)
        if trainer.is_global_zero:
            self._ranks = _rank(trainer, required_network(self, pl_module), self.survey)
        for replica, verdict in enumerate(self.verdicts):
            name = f" (replica {replica})" if len(self.verdicts) > 1 else ""
            rank_zero_info(f"LocalMinimumDetector{name}: {verdict.kind}: {verdict.reason}")

    @override
    def summary(self) -> dict[str, Any]:
        if self.survey is None:
            return {}
        verdicts = {
            "kind": [str(verdict.kind) for verdict in self.verdicts],
            "reason": [verdict.reason for verdict in self.verdicts],
        }
        return {
            "mse": plain(self.survey.mse),
            "mce": plain(self.survey.mce),
            "wrong": plain(self.survey.wrong),
            **{key: values if self.survey.mse.ndim else values[0] for key, values in verdicts.items()},
            "zero_error": plain(self.survey.zero_error),
            "rounding_bound": plain(self.survey.rounding_bound),
            "stationarity": plain(self.survey.stationarity),
            "distance": None,
            "margin_ratio": None,
            "min_preactivation": plain(self.survey.smallest_preactivation),
            "relative_preactivation": plain(self.survey.smallest_sine),
            "kinks": plain(self.survey.kinks),
            "rank": self._ranks,
            "rank_cap": plain(self._rank_cap),
        }

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"passed": self._passed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._passed = state_dict.get("passed", 0)

    def _log(self, trainer: pl.Trainer, survey: Survey) -> None:
        log_scalars(
            trainer,
            {
                "minimum/mse": survey.mse,
                "minimum/mce": survey.mce,
                "minimum/stationarity": survey.stationarity,
                "minimum/min_preactivation": survey.smallest_preactivation,
                "minimum/relative_preactivation": survey.smallest_sine,
                "minimum/kinks": survey.kinks,
                "minimum/rank_cap": self._rank_cap,
            },
        )


def _rank(trainer: pl.Trainer, network: Network, survey: Survey) -> int | list[int] | None:
    """Rank of A∘X at the surveyed weights, where it takes seconds at most; None elsewhere."""
    if len(network.hidden_weights) > 1:
        return None
    num_weights = network.input_dim * network.hidden_dims[0]
    operations = survey.num_samples * num_weights * min(survey.num_samples, num_weights) * survey.mse.numel()
    if operations > _RANK_OPERATIONS:
        return None
    batches = exact_shard(trainer.train_dataloader)  # the whole set on every process: it is small
    replicated = survey.mse.ndim > 0
    inputs = torch.cat([flat_batch(batch, replicated=replicated)[0] for batch in batches], dim=-2)
    pattern = survey.layers[0].pattern.unpack()
    return Region(inputs.to("cpu", network.output_weights.dtype), pattern, network.negative_slope).rank()
