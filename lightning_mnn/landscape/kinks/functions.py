"""The piecewise-linear functions of torch: which piece a number is on, and its distance to the nearest kink."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightning_mnn.landscape.kinks.pieces import Elementwise, Function, Largest
from lightning_mnn.landscape.kinks.pooling import adaptive_max_pooling, max_pooling

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor


# Nonlinear functions without pieces, or, as hardswish, with curved ones.
# fmt: off
SMOOTH = frozenset([
    "celu", "cos", "cosine_similarity", "erf", "exp", "expit", "expm1", "gelu", "glu", "group_norm", "gru",
    "gru_cell", "gumbel_softmax", "hardswish", "huber_loss", "instance_norm", "layer_norm", "log", "log1p",
    "log_softmax", "logsigmoid", "logsumexp", "lstm", "lstm_cell", "mish", "multi_head_attention_forward", "normalize",
    "pow", "reciprocal", "rms_norm", "rnn_relu", "rnn_relu_cell", "rnn_tanh", "rnn_tanh_cell", "rsqrt",
    "scaled_dot_product_attention", "sigmoid", "silu", "sin", "smooth_l1_loss", "softmax", "softmin",
    "softplus", "softsign", "special_expit", "sqrt", "square", "tanh", "tanhshrink",
])

# fmt: on
# Functions with kinks that cannot be determined from their inputs here.
# fmt: off
OPAQUE = frozenset([
    "aminmax", "ceil", "cosine_embedding_loss", "cummax", "cummin", "floor", "fmod", "fractional_max_pool2d",
    "fractional_max_pool3d", "heaviside", "hinge_embedding_loss", "kthvalue", "margin_ranking_loss", "median", "mod",
    "multi_margin_loss", "multilabel_margin_loss", "nanmedian", "nanquantile", "quantile", "remainder", "rmod",
    "rnn_relu", "rnn_relu_cell", "round", "sign", "sort", "topk", "triplet_margin_loss",
    "triplet_margin_with_distance_loss", "trunc", "where",
])

# fmt: on
# Functions that have such kinks if they compute maxima or minima, and none if they compute sums or means.
_REDUCTIONS = frozenset(["embedding_bag", "index_reduce", "scatter_reduce"])


class _Order(NamedTuple):
    """Which argument of a norm is its order, and which orders have kinks that are not supported here."""

    name: str
    place: int
    default: float
    unseen: tuple[Any, ...]

    def of(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """The order of a call."""
        return kwargs.get(self.name, args[self.place] if len(args) > self.place else self.default)


_LARGEST = (math.inf, -math.inf, "inf", "-inf")

_SUMS = (1, -1, *_LARGEST)

_ORDERS = {
    "norm": _Order("p", 1, 2, (*_LARGEST, "nuc")),
    "linalg_vector_norm": _Order("ord", 1, 2, _LARGEST),
    "linalg_norm": _Order("ord", 1, 2, _LARGEST),
    "linalg_matrix_norm": _Order("ord", 1, 2, _SUMS),
    "matrix_norm": _Order("ord", 1, 2, _SUMS),
    "dist": _Order("p", 2, 2, _SUMS),
    "cdist": _Order("p", 2, 2, _SUMS),
    "pdist": _Order("p", 1, 2, _SUMS),
    "pairwise_distance": _Order("p", 2, 2, _SUMS),
}


def has_kinks(name: str) -> bool:
    """Whether the kinks of a function of torch are supported here."""
    return name in _FUNCTIONS


def is_smooth(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call of torch is of a smooth nonlinear function, without pieces; an ELU is if its slopes at 0 agree.

    >>> x = torch.zeros(1)
    >>> is_smooth("elu", (x,), {}), is_smooth("elu", (x, 0.5), {}), is_smooth("tanh", (x,), {})
    (True, False, True)
    """
    return name in SMOOTH or (name == "elu" and _elu(*args, **kwargs) is None)


def has_unseen_kinks(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether a call of torch has kinks that cannot be determined here.

    >>> has_unseen_kinks("sort", (), {}), has_unseen_kinks("embedding_bag", (), {"mode": "mean"})
    (True, False)
    """
    order = _ORDERS.get("linalg_matrix_norm" if name == "linalg_norm" and _first(args, kwargs).ndim > 1 else name)
    if order is not None:
        return order.of(args, kwargs) in order.unseen
    if name in _REDUCTIONS:
        return any(value in ("amax", "amin", "max") for value in (*args, *kwargs.values()) if isinstance(value, str))
    return name in OPAQUE


def function_of(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Function | None:
    """The kinks of one call of torch, found by the function's name; None if it has none.

    Args:
        name: name of the function or method, without leading and trailing underscores.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
    """
    build = _FUNCTIONS.get(name)
    if build is None:
        return None
    call = build(*args, **kwargs)
    return None if call is None or not call.input.is_floating_point() else call


def _at_zero(input: Tensor, *_: Any, **__: Any) -> Function:  # noqa: A002 (torch's name, which may be a keyword)
    return Elementwise(input)


def _elu(input: Tensor, alpha: float = 1.0, *_: Any, **__: Any) -> Function | None:  # noqa: A002
    """α (exp(x) − 1) below 0 and x above; no kink if α = 1, as the slopes at 0 then agree."""
    return None if alpha == 1 else Elementwise(input)


def _hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, *_: Any, **__: Any) -> Function:  # noqa: A002
    return Elementwise(input, (min_val, max_val))


def _relu6(input: Tensor, *_: Any, **__: Any) -> Function:  # noqa: A002
    return Elementwise(input, (0.0, 6.0))


def _at_three(input: Tensor, *_: Any, **__: Any) -> Function:  # noqa: A002 (hardsigmoid and hardswish)
    return Elementwise(input, (-3.0, 3.0))


def _threshold(input: Tensor, threshold: float, *_: Any, **__: Any) -> Function:  # noqa: A002
    return Elementwise(input, (threshold,))


def _shrink(input: Tensor, lambd: float = 0.5, **_: Any) -> Function:  # noqa: A002
    return Elementwise(input, (-lambd, lambd), active_pieces=(0, 2))


def _clamp(input: Tensor, min: Any = None, max: Any = None, **_: Any) -> Function | None:  # noqa: A002
    bounds = tuple(bound for bound in (min, max) if bound is not None)
    if not bounds:
        return None
    return Elementwise(input, bounds, active_pieces=(0,) if min is None else (1,))


def _clamp_min(input: Tensor, min: Any, **_: Any) -> Function | None:  # noqa: A002
    return _clamp(input, min)


def _clamp_max(input: Tensor, max: Any, **_: Any) -> Function | None:  # noqa: A002
    return _clamp(input, None, max)


def _l1_loss(input: Tensor, target: Tensor, *_: Any, **__: Any) -> Function:  # noqa: A002
    return Elementwise(input, (target,), active_pieces=None)


def _norm(name: str) -> Callable[..., Function | None]:
    """Σ |x| has a kink where an x is zero; norms of other orders have none in a single x."""

    def build(*args: Any, **kwargs: Any) -> Function | None:
        seen = _ORDERS[name].of(args, kwargs) == 1 and not has_unseen_kinks(name, args, kwargs)
        return Elementwise(_first(args, kwargs), active_pieces=None) if seen else None

    return build


def _first(args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """The first tensor among the arguments, positional or by keyword."""
    tensor: Tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    return tensor


def _maximum(input: Tensor, other: Tensor, *, sign: int = 1, **_: Any) -> Function:  # noqa: A002
    def numbers() -> Tensor:
        shape = (input + other).shape
        return torch.stack([(sign * input).expand(shape), (sign * other).expand(shape)], dim=-1)

    return Largest(input, 2, numbers, others=(other,))


def _minimum(input: Tensor, other: Tensor, **_: Any) -> Function:  # noqa: A002
    return _maximum(input, other, sign=-1)


def _max(input: Tensor, dim: Any = None, keepdim: bool = False, *, sign: int = 1, **kwargs: Any) -> Function:  # noqa: A002, FBT001, FBT002
    """``torch.max``, ``min``, ``amax`` and ``amin``: over one axis, several, all, or of two tensors."""
    dim, keepdim = kwargs.get("axis", dim), kwargs.get("keepdims", keepdim)
    other = kwargs.get("other", dim)
    if isinstance(other, torch.Tensor):
        return _maximum(input, other, sign=sign)
    chosen = (dim,) if isinstance(dim, int) else tuple(dim or range(input.ndim))
    axes = sorted(axis % input.ndim for axis in chosen)
    size = math.prod(input.shape[axis] for axis in axes)

    def numbers() -> Tensor:
        rest = [axis for axis in range(input.ndim) if axis not in axes]
        moved = (sign * input).permute(*rest, *axes).flatten(len(rest))
        return moved.reshape([1 if a in axes else n for a, n in enumerate(input.shape)] + [size]) if keepdim else moved

    return Largest(input, size, numbers)


def _min(input: Tensor, *args: Any, **kwargs: Any) -> Function:  # noqa: A002
    return _max(input, *args, sign=-1, **kwargs)


_FUNCTIONS: dict[str, Callable[..., Function | None]] = {
    **dict.fromkeys(("relu", "leaky_relu", "prelu", "rrelu", "selu", "abs", "absolute"), _at_zero),
    "elu": _elu,
    "relu6": _relu6,
    "hardtanh": _hardtanh,
    "hardsigmoid": _at_three,
    "hardswish": _at_three,
    "threshold": _threshold,
    "hardshrink": _shrink,
    "softshrink": _shrink,
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": _clamp_min,
    "clamp_max": _clamp_max,
    "l1_loss": _l1_loss,
    **{name: _norm(name) for name in ("norm", "linalg_vector_norm", "linalg_norm")},
    **dict.fromkeys(("maximum", "fmax"), _maximum),
    **dict.fromkeys(("minimum", "fmin"), _minimum),
    **dict.fromkeys(("max", "amax"), _max),
    **dict.fromkeys(("min", "amin"), _min),
    **{f"max_pool{m}d": max_pooling(m) for m in (1, 2, 3)},
    **{f"max_pool{m}d_with_indices": max_pooling(m) for m in (1, 2, 3)},
    **{f"adaptive_max_pool{m}d": adaptive_max_pooling(m) for m in (1, 2, 3)},
    **{f"adaptive_max_pool{m}d_with_indices": adaptive_max_pooling(m) for m in (1, 2, 3)},
}
