"""What a calculation gives on the CPU and on the device: where to put its input, and whether the results agree."""

import dataclasses
import math
from enum import Enum

import numpy as np
import torch


def parts(value):
    """The parts of a result that has any, by name."""
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    return None


def walk(value, path="result"):
    """A result and all parts within it, each with its path."""
    yield path, value
    for name, part in (parts(value) or {}).items():
        yield from walk(part, f"{path}.{name}")


def placed(value, device):
    """A value with all of its tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **{name: placed(part, device) for name, part in parts(value).items()})
    if isinstance(value, list | tuple):
        return type(value)(placed(part, device) for part in value)
    return value


def differences(one, other, tolerance):
    """The paths of parts that two results do not have in common: numbers within a tolerance, all else the same."""
    found, beside = dict(walk(one)), dict(walk(other))
    if found.keys() != beside.keys():
        return sorted(found.keys() ^ beside.keys())
    return [path for path in found if not _agree(found[path], beside[path], tolerance)]


def _agree(one, other, tolerance):
    if type(one) is not type(other):
        return False
    if isinstance(one, str) and not isinstance(one, Enum):
        return True  # a sentence for people, with numbers in it
    if isinstance(one, float):
        both_unknown = math.isnan(one) and math.isnan(other)
        return both_unknown or math.isclose(one, other, rel_tol=tolerance, abs_tol=1e-13)
    if isinstance(one, torch.Tensor | np.ndarray):
        return _close(torch.as_tensor(one).detach().cpu(), torch.as_tensor(other).detach().cpu(), tolerance)
    return one == other if isinstance(one, int | Enum | torch.Size) or one is None else True


def _close(one, other, tolerance):
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    finite = one[one.isfinite()]
    size = float(finite.abs().max()) if len(finite) else 0.0
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * size, equal_nan=True)
