"""Gaussian inputs with random labels or with the outputs of a teacher network: the paper's synthetic data."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_mnn.data.loaders.resident import ResidentData
from lightning_mnn.utilities.seeding import generator
from lightning_mnn.utilities.validation import check_memory, one_of, positive_integer, whole_number

LABELS = ("plus_minus", "zero_one", "teacher")


class GaussianData(ResidentData):
    """N inputs x ~ N(0, I_d0) and random targets, drawn independently for each replica from its own seed.

    They are drawn in float64 on the CPU, so they do not depend on the device or the dtype.

    Args:
        num_samples: N.
        input_dim: d0.
        labels: "plus_minus" (±1 with probability ½ each, the paper's experiments), "zero_one" ({0, 1}), or "teacher":
            the real-valued outputs of a random two-layer ReLU network (train with ``MNN(regression=True)``).
        teacher_width: width of the teacher network.
        num_test: number of test samples: fresh inputs, with labels drawn in the same way or outputs of the same
            teacher. They do not depend on N.
        dtype: "float64" or "float32".
        **options: see :class:`ResidentData`.

    Raises:
        ValueError: a size is not positive, or ``labels`` is unknown.

    >>> inputs, targets = GaussianData(num_samples=6, input_dim=3, replicas=2).tensors()
    >>> inputs.shape, targets.shape, sorted(targets.unique().tolist())
    (torch.Size([2, 6, 3]), torch.Size([2, 6]), [-1.0, 1.0])
    """

    test_set_remedy = "give num_test (data.num_test), the number of test samples"

    def __init__(
        self,
        num_samples: int = 320,
        input_dim: int = 40,
        labels: str = "plus_minus",
        teacher_width: int = 10,
        dtype: str = "float64",
        *,
        num_test: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(dtype=dtype, **options)
        self.num_samples = positive_integer("num_samples", num_samples)
        self.labels = one_of("labels", labels, LABELS)
        self.teacher_width = positive_integer("teacher_width", teacher_width)
        self._input_dim = positive_integer("input_dim", input_dim)

        self.num_test = whole_number("num_test", num_test, at_least=0)

        needed = 8.0 * self.replicas * (self.num_samples + self.num_test) * self._input_dim
        sizes = {"num_samples": num_samples, "num_test": num_test, "input_dim": input_dim, "replicas": self.replicas}
        check_memory(needed, "the inputs", sizes)

    @property
    @override
    def input_dim(self) -> int:
        return self._input_dim

    @override
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self._all_replicas(self.num_samples)

    @override
    def test_tensors(self) -> tuple[Tensor, Tensor] | None:
        return self._all_replicas(self.num_test, "test") if self.num_test else None

    def _all_replicas(self, count: int, *purpose: str) -> tuple[Tensor, Tensor]:
        drawn = [self._draw(seed, count, *purpose) for seed in self.seeds]
        if len(drawn) == 1:
            return drawn[0]
        return torch.stack([inputs for inputs, _ in drawn]), torch.stack([targets for _, targets in drawn])

    def _draw(self, seed: int, count: int, *purpose: str) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(
            (count, self.input_dim), generator=generator(seed, "inputs", *purpose), dtype=torch.float64
        )
        if self.labels == "teacher":
            return inputs, self._teacher_outputs(inputs, seed)
        ones = torch.randint(0, 2, (count,), generator=generator(seed, "labels", *purpose)).double()
        return inputs, ones if self.labels == "zero_one" else 2 * ones - 1

    def _teacher_outputs(self, inputs: Tensor, seed: int) -> Tensor:
        draw = generator(seed, "teacher")
        hidden = torch.randn(self.teacher_width, self.input_dim, generator=draw, dtype=torch.float64)
        output = torch.randn(self.teacher_width, generator=draw, dtype=torch.float64)
        scale = math.sqrt(2 / (self.input_dim * self.teacher_width))  # makes the variance of the outputs about 1
        return torch.relu(inputs @ hidden.T) @ output * scale
