"""fit_together: train many networks at once from Python, each with a Trainer of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_mnn.model.lockstep import run_in_lockstep

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytorch_lightning as pl


@dataclass(frozen=True)
class Fit:
    """A call of ``trainer.fit``.

    Attributes:
        trainer: the Trainer.
        model: the module, an MNN.
        data: a DataModule, or the loader of the training set.
        options: further arguments, such as ``ckpt_path``.
    """

    trainer: pl.Trainer
    model: pl.LightningModule
    data: Any
    options: dict[str, Any] | None = None

    def run(self) -> None:
        """Call it."""
        self.trainer.fit(self.model, self.data, **(self.options or {}))


def fit_together(fits: Sequence[Fit], *, max_replicas: int | None = None) -> None:
    """Train several networks at once, and compute the optimiser steps of all MNNs of equal shapes together.

    The networks may differ in seed, data, optimiser, learning rate, schedule, negative slope, length of training and
    callbacks. Each is trained as by ``trainer.fit`` alone, up to rounding. One that fails leaves the others alone.

    Args:
        fits: what to fit; each needs its own Trainer, module and data module.
        max_replicas: how many are trained at the same time; None: all.

    Raises:
        ExceptionGroup: some have failed; the others were trained to the end.
        ValueError: two of them share a Trainer or a module.

    >>> from lightning_mnn import MNN, Fit, fit_together
    >>> from lightning_mnn.data import GaussianData
    >>> import pytorch_lightning as pl
    >>> quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    >>> fits = [
    ...     Fit(
    ...         pl.Trainer(max_epochs=5, enable_model_summary=False, **quiet),
    ...         MNN(3, (4,), optimizer={"name": "adam", "lr": rate}, seed=seed, default_callbacks=False),
    ...         GaussianData(num_samples=20, input_dim=3, seed=seed, dtype="float64"),
    ...     )
    ...     for seed in (0, 1)
    ...     for rate in (0.1, 0.01)
    ... ]
    >>> fit_together(fits)
    >>> [fit.trainer.global_step for fit in fits]
    [5, 5, 5, 5]
    """
    for name in ("trainer", "model"):
        if len({id(getattr(fit, name)) for fit in fits}) < len(fits):
            raise ValueError(f"two fits share a {name}: each needs its own")
    errors: list[Exception] = []

    def work(fit: Fit) -> None:
        try:
            fit.run()
        except Exception as error:  # noqa: BLE001 (raised with the others' at the end)
            error.add_note(f"in fit number {[other is fit for other in fits].index(True)}")
            errors.append(error)

    run_in_lockstep(
        [lambda fit=fit: work(fit) for fit in fits],  # type: ignore[misc]
        max_replicas=max_replicas or max(1, len(fits)),
    )
    if errors:
        raise ExceptionGroup(f"{len(errors)} of {len(fits)} fits have failed", errors)
