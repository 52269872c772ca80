"""The results of a run, read from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from omegaconf import DictConfig, OmegaConf
from typing_extensions import override

from lightning_mnn.callbacks.pattern_store import PatternStore
from lightning_mnn.config.build import build
from lightning_mnn.model.mnn import MNN
from lightning_mnn.runs.checkpoints import read_checkpoint
from lightning_mnn.utilities.files import read_csv, read_json, relative

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np

    from lightning_mnn.data import ExactData


@dataclass(frozen=True)
class Run:
    """The results of one run.

    Attributes:
        folder: the run folder.
        summary: the content of its ``summary.json``; empty if the run has none yet.
        config: its composed config.
    """

    folder: Path
    summary: dict[str, Any]
    config: DictConfig

    @cached_property
    def metrics(self) -> Any:
        """What was logged, a row for each logged step: a pandas ``DataFrame``, without pandas a ``pyarrow.Table``."""
        path = self.folder / "metrics.csv"
        rows = read_csv(path) if path.exists() else []
        names = list(rows[0]) if rows else []
        return in_pandas(pa.table({name: [_number(row[name]) for row in rows] for name in names}))

    @property
    def patterns(self) -> Patterns:
        """The recorded activation patterns, which are read from disk when a step is looked up."""
        return Patterns(PatternStore(self.folder / "patterns.zarr"))

    def module(self, checkpoint: str | Path = "last.ckpt") -> MNN:
        """The trained network on the CPU.

        Args:
            checkpoint: name of a file in ``checkpoints/``, or a path.

        Raises:
            FileNotFoundError: there is no such checkpoint.
            DamagedFileError: it was cut or changed.
        """
        path = self.folder / "checkpoints" / checkpoint
        if not path.is_file():
            found = ", ".join(sorted(file.name for file in path.parent.glob("*.ckpt"))) or "none"
            raise FileNotFoundError(f"checkpoint={checkpoint}: {relative(path)} is not a file; there are: {found}")
        read_checkpoint(path, "choose another checkpoint")
        return MNN.load_from_checkpoint(path, map_location="cpu", weights_only=True).eval()

    def data(self, **changes: Any) -> ExactData:
        """The data module of the run, built anew and set up.

        Its ``inputs`` and ``targets`` are the training set, with the labels that the run had: also where they were
        changed by ``label_noise`` or ``random_labels``. Streamed images have no ``inputs``.

        Args:
            **changes: arguments that replace those of the run, as ``root`` for images that lie elsewhere.
        """
        config = self.config.copy()
        config.data.update(changes)
        return data_of(config)


def data_of(config: DictConfig) -> ExactData:
    """The data module of a config, built and set up."""
    datamodule: ExactData = build(config, "data")
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


class Patterns(Mapping[int, "dict[str, np.ndarray]"]):
    """Activation patterns by recorded step: for each layer a bool array (N, d1), with replicas (R, N, d1).

    If the units of a layer have more than two pieces, its array contains the numbers of the pieces.

    Args:
        store: the store in which a recorder wrote them.
    """

    def __init__(self, store: PatternStore) -> None:
        self.store = store

    @override
    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        found = self.store.read(step).items()
        return {
            name: (pattern.active if hasattr(pattern, "active") else pattern.pieces).numpy() for name, pattern in found
        }

    @override
    def __iter__(self) -> Iterator[int]:
        return iter(self.store.steps)

    @override
    def __len__(self) -> int:
        return len(self.store.steps)


def load_run(folder: str | Path) -> Run:
    """The results of the run in a folder.

    Raises:
        FileNotFoundError: the folder is not that of a run.
        DamagedFileError: one of its files was cut or changed.
    """
    folder = Path(folder)
    config = folder / ".hydra" / "config.yaml"
    if not config.is_file():
        problem = "is the folder of a sweep: use load_sweep" if any(folder.glob("*/.hydra")) else "is not that of a run"
        raise FileNotFoundError(f"folder={relative(folder)} {problem} ({config.name} is missing in .hydra)")
    cfg = OmegaConf.load(config)
    assert isinstance(cfg, DictConfig)  # noqa: S101 (Hydra writes a mapping)
    cfg.run_dir = str(folder)  # it refers to the running job
    summary = folder / "summary.json"
    return Run(folder, read_json(summary) if summary.exists() else {}, cfg)


def in_pandas(table: pa.Table) -> Any:
    """The table as a pandas ``DataFrame``; without pandas unchanged."""
    return table if find_spec("pandas") is None else table.to_pandas()


def _number(text: str) -> float | None:
    """The number in a field of a log; None if the field is empty."""
    return float(text) if text else None
