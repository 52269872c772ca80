"""The user's own data: NumPy arrays, tensors, or a file of them.

Shapes: N samples, d0 inputs, R replicas.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_only
from typing_extensions import override

from lightning_mnn.data.array_files import ARRAYS, read_arrays
from lightning_mnn.data.loaders.resident import ResidentData
from lightning_mnn.data.loaders.selection import held_out, subset
from lightning_mnn.utilities.validation import ArgumentError, one_of, positive_integer, real_number, seed_number

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

LABELS = ("zero_one", "plus_minus", "real", None)
_PAIRS = {"zero_one": (0, 1), "plus_minus": (-1, 1)}


class ArrayData(ResidentData):
    """A training set, and perhaps a test set, of arrays or tensors; they are checked when the object is created.

    Targets with two different values are labels, whatever they are: numbers, booleans, texts. In ascending order they
    become −1 and 1, or 0 and 1, and a line on standard error says so. Targets with more values must be numbers, and are
    used as they are (train with ``MNN(regression=True)``).

    Args:
        inputs: (N, d0), or (R, N, d0) with one data set per replica.
        targets: (N,) or (N, 1), or (R, N) with one list of targets per replica.
        test_inputs: as inputs, with another N; None: the test set is the ``test_fraction`` of the samples.
        test_targets: as targets.
        labels: "zero_one" or "plus_minus", to which two labels are mapped; "real": targets are real numbers, even if
            there are only two; None: labels 0 and 1 are kept, and others become −1 and 1.
        num_samples: size of a random subset of the training set, drawn for each replica with its seed; None: all.
        test_fraction: fraction of the samples that are held out at random as a test set, if there is no other.
        split_seed: seed of that choice; it is the same for all replicas and, by default, for all seeds.
        dtype: "float64" or "float32".
        **options: see :class:`~lightning_mnn.data.ResidentData`.

    Raises:
        ArgumentError: shapes do not match, values are NaN or infinite, there are no samples, all targets are equal,
            more than two labels are texts, a label of the test set does not occur in training, or an option is out of
            its range.

    >>> data = ArrayData([[0, 1], [2, 3], [4, 5]], ["cat", "dog", "cat"], labels="zero_one")
    >>> data.setup()
    >>> data.targets
    tensor([0., 1., 0.], dtype=torch.float64)
    """

    test_set_remedy = "give test_inputs and test_targets (in data.file), or a test_fraction"

    def __init__(
        self,
        inputs: ArrayLike | Tensor,
        targets: ArrayLike | Tensor,
        test_inputs: ArrayLike | Tensor | None = None,
        test_targets: ArrayLike | Tensor | None = None,
        *,
        labels: str | None = None,
        num_samples: int | None = None,
        test_fraction: float = 0.0,
        split_seed: int = 0,
        dtype: str = "float64",
        **options: Any,
    ) -> None:
        super().__init__(dtype=dtype, **options)
        self.labels = one_of("labels", labels, LABELS)
        self.num_samples = None if num_samples is None else positive_integer("num_samples", num_samples)
        self.test_fraction = real_number("test_fraction", test_fraction, at_least=0, below=1)
        self.split_seed = seed_number("split_seed", split_seed)
        given = dict(zip(ARRAYS, (inputs, targets, test_inputs, test_targets), strict=True))
        arrays = {name: _array(name, value) for name, value in given.items() if value is not None}
        _check_shapes(arrays, self.replicas)
        mapped, remark = _mapped_targets(arrays, labels)
        numbers = {name: self._numbers(name, array) for name, array in (arrays | mapped).items()}
        self._train = numbers["inputs"], numbers["targets"]
        self._test = (numbers["test_inputs"], numbers["test_targets"]) if "test_inputs" in numbers else None
        self._select()
        _say(remark)  # now that nothing can be refused any more

    @property
    @override
    def input_dim(self) -> int:
        return self._train[0].shape[-1]

    @override
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self._train

    @override
    def test_tensors(self) -> tuple[Tensor, Tensor] | None:
        return self._test

    def _numbers(self, name: str, array: NDArray[Any]) -> Tensor:
        """An array as a tensor of the data's dtype, without axes of size 1 that have no meaning."""
        if not _is_numeric(array):
            raise ArgumentError(name, str(array.dtype), "must be numbers", "encode texts as numbers first")
        with np.errstate(over="ignore"):
            converted = array.astype(np.float64 if self.dtype == torch.float64 else np.float32)
        if not (finite := np.isfinite(converted)).all():
            problem = f"must not contain NaN or infinity in {str(self.dtype).removeprefix('torch.')}"
            remedy = f"{int((~finite).sum())} values are so: remove those samples, or fill the values"
            raise ArgumentError(name, float(array[~finite].flat[0]), problem, remedy)
        return torch.from_numpy(converted)

    def _select(self) -> None:
        """Hold out a test set, and choose a subset of the rest."""
        if self.test_fraction:
            if self._test is not None:
                raise ArgumentError("test_fraction", self.test_fraction, "must be 0 with data that have a test set")
            kept, held = held_out(self._train[0].shape[-2], self.test_fraction, self.split_seed)
            inputs, targets = self._train
            self._train = inputs[..., kept, :], targets[..., kept]
            self._test = inputs[..., held, :], targets[..., held]
        if self.num_samples is not None:
            available = self._train[0].shape[-2]
            index = torch.stack([subset(available, self.num_samples, seed) for seed in self.seeds])  # (R, n)
            self._train = _chosen(*self._train, index)


class ArrayFileData(ArrayData):
    """The data of :class:`ArrayData` from a file.

    Args:
        file: an ``.npz`` with the arrays ``inputs`` and ``targets``, and perhaps ``test_inputs`` and ``test_targets``;
            or a table, ``.csv`` with a header or ``.parquet``, whose columns but one are the inputs.
        target: the column of a table that contains the targets.
        **options: see :class:`ArrayData`.

    Raises:
        ArgumentError: the file cannot be read or lacks an array or a column, or :class:`ArrayData` raises it.
    """

    def __init__(self, file: str | Path, target: str | None = None, **options: Any) -> None:
        arrays: dict[str, Any] = read_arrays(file, target)
        try:
            super().__init__(**arrays, **options)
        except ArgumentError as error:
            if error.name not in ARRAYS:
                raise
            problem = f"{error.name} {error.problem}, got {error.value}"
            raise ArgumentError("file", str(file), problem, error.remedy) from None


def _array(name: str, value: ArrayLike | Tensor) -> NDArray[Any]:
    """Anything that is like an array, as an array of numbers or texts."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
    try:
        array: NDArray[Any] = np.asarray(value)
        array = array.astype(str) if array.dtype.kind == "S" else array
        if array.dtype.kind == "O":  # as pandas stores texts
            is_text = all(isinstance(item, str) for item in array.flat)
            array = array.astype(str if is_text else np.float64)
    except (TypeError, ValueError):
        raise ArgumentError(name, type(value).__name__, "must be an array of numbers or texts") from None
    return array


def _check_shapes(arrays: dict[str, NDArray[Any]], replicas: int) -> None:
    """Check that the arrays fit one another and the number of replicas; drop axes of size 1 that have no meaning."""
    for prefix in ("", "test_"):
        names = f"{prefix}inputs", f"{prefix}targets"
        present = [name for name in names if name in arrays]
        if not present:
            continue
        if len(present) == 1:
            (missing,) = {*names} - {*present}
            raise ArgumentError(present[0], arrays[present[0]].shape, f"needs {missing}", "give both, or neither")
        inputs, targets = (arrays[name] for name in names)
        if inputs.ndim == 3 and inputs.shape[0] == replicas == 1:
            inputs = arrays[names[0]] = inputs[0]
        if inputs.ndim not in (2, 3) or (inputs.ndim == 3 and inputs.shape[0] != replicas):
            problem = f"must have shape (N, d0), or (R, N, d0) with R = {replicas} replicas"
            remedy = "flatten images, or set replicas" if inputs.ndim > 2 else "make it a table of N rows"
            raise ArgumentError(names[0], inputs.shape, problem, remedy)
        if inputs.size == 0:
            raise ArgumentError(names[0], inputs.shape, "must have one or more samples and inputs", "add some")
        count = inputs.shape[-2]
        if targets.shape == (count, 1) or (replicas == 1 and targets.shape == (1, count)):
            targets = arrays[names[1]] = targets.reshape(count)
        if targets.shape not in ((count,), (replicas, count)):
            problem = f"must have shape ({count},){f' or ({replicas}, {count})' * (replicas > 1)}"
            raise ArgumentError(names[1], targets.shape, problem, f"give one target for each row of {names[0]}")
    if "test_inputs" in arrays and arrays["test_inputs"].shape[-1] != arrays["inputs"].shape[-1]:
        problem = f"must have {arrays['inputs'].shape[-1]} columns, as the inputs"
        raise ArgumentError("test_inputs", arrays["test_inputs"].shape, problem, "use the same inputs in both")


def _mapped_targets(arrays: dict[str, NDArray[Any]], labels: str | None) -> tuple[dict[str, NDArray[Any]], str | None]:
    """The targets as numbers, two labels as −1 and 1 or as 0 and 1; and a remark on what they are now."""
    found = {name: array for name, array in arrays.items() if name.endswith("targets")}
    targets = found["targets"]
    is_text = not _is_numeric(targets)
    if (labels == "real" and not is_text) or (not is_text and not np.isfinite(targets).all()):  # refused later
        return found, None
    values = np.unique(targets)
    if len(values) == 1:
        problem, remedy = "must not all be equal", "there is nothing to learn from them"
        raise ArgumentError("targets", values[0].item(), problem, remedy)
    if len(values) > 2 and (is_text or labels is not None):
        problem = f"must be two labels, and there are {len(values)} different ones"
        remedy = "map the classes to two" + ("" if is_text else ", or leave labels out for real targets")
        raise ArgumentError("targets", [*values[:3].tolist(), "…"], problem, remedy)
    if len(values) > 2:
        return found, None
    pair = _PAIRS.get(labels or "", (0, 1) if not is_text and (values == (0, 1)).all() else (-1, 1))
    remark = f"the labels {values[0]} and {values[1]} become {pair[0]} and {pair[1]}"
    changes = is_text or bool((values != pair).any())
    return {name: _with_labels(name, array, values, pair) for name, array in found.items()}, remark if changes else None


def _is_numeric(array: NDArray[Any]) -> bool:
    return array.dtype.kind in "biuf"


def _with_labels(name: str, array: NDArray[Any], values: NDArray[Any], pair: tuple[int, int]) -> NDArray[Any]:
    """Targets with two values, replaced by a pair of labels."""
    comparable = _is_numeric(array) == _is_numeric(values)
    unknown = array[~np.isin(array, values)] if comparable else array
    if unknown.size:
        problem = f"must be labels of the training set, {values[0]} and {values[1]}"
        raise ArgumentError(name, unknown.flat[0].item(), problem, "remove the other samples")
    return np.where(array == values[1], pair[1], pair[0])


def _chosen(inputs: Tensor, targets: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The samples at indices (R, n): (R, n, d0) and (R, n), without the first axis if R = 1."""
    replicas = len(index)
    rows = [(inputs[r] if inputs.ndim == 3 else inputs)[index[r]] for r in range(replicas)]
    chosen = [(targets[r] if targets.ndim == 2 else targets)[index[r]] for r in range(replicas)]
    return (torch.stack(rows), torch.stack(chosen)) if replicas > 1 else (rows[0], chosen[0])


@rank_zero_only
def _say(remark: str | None) -> None:
    if remark is not None:
        sys.stderr.write(remark + "\n")
