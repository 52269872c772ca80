"""torch's switches for float32 products in reduced precision (TF32, bfloat16), in their old and their new form.

Up to torch 2.8 there are ``torch.set_float32_matmul_precision`` and the ``allow_tf32`` of cuBLAS and cuDNN. Since torch
2.9 each backend and kind of operation has a switch ``fp32_precision``; a switch without a value of its own inherits the
value of its parent. The old switches still exist, and raise an error if they are read after the new ones were used.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lightning_mnn.utilities.compat.missing import attribute

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_FULL = "ieee"
_INHERITED = "none"


@contextmanager
def full_precision() -> Iterator[None]:
    """A context in which products and convolutions of float32 use full float32 precision, on every device.

    Afterwards all switches are restored, whether the old or the new ones were used, and a switch that inherited its
    value still does. Inside, the old switch of cuDNN may not be readable since torch 2.9, because the default of the
    new one cannot be restored once it was changed.

    >>> torch.set_float32_matmul_precision("high")
    >>> with full_precision():
    ...     torch.get_float32_matmul_precision()
    'highest'
    >>> torch.get_float32_matmul_precision()
    'high'
    >>> torch.set_float32_matmul_precision("highest")
    """
    with ExitStack() as afterwards:
        if hasattr(torch.backends, "fp32_precision"):
            _set_new(afterwards)
        else:
            _set_old(afterwards)
        yield


def _set_old(afterwards: ExitStack) -> None:
    """Set the old switches, for torch before 2.9."""
    afterwards.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    afterwards.callback(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


def _set_new(afterwards: ExitStack) -> None:
    """Set the new switches, for torch since 2.9, and make the old ones readable if that can be undone.

    Parents come before children: a child that is not full below a full parent has a value of its own.
    """
    cublas: Any = torch.backends.cuda.matmul
    matmul = _value(torch.get_float32_matmul_precision) if _value(partial(getattr, cublas, "allow_tf32")) else None
    cudnn = _value(partial(getattr, torch.backends.cudnn, "allow_tf32"))
    own = set()
    for name, (get, put) in _switches().items():
        value = get()
        if value != _FULL:
            own.add(name)
            afterwards.callback(put, value)
            put(_FULL)
    if matmul == "high" or (matmul == "medium" and "mkldnn.matmul" in own):
        if "cuda.matmul" not in own:
            afterwards.callback(setattr, cublas, "fp32_precision", _INHERITED)
        if matmul == "high":  # set no value for oneDNN, which may have inherited it
            afterwards.callback(_allow_tf32, cublas)
        else:
            afterwards.callback(torch.set_float32_matmul_precision, matmul)
        cublas.allow_tf32 = False
    if cudnn and {"cuda.conv", "cuda.rnn"} <= own:
        afterwards.callback(_allow_tf32, torch.backends.cudnn)
        torch.backends.cudnn.allow_tf32 = False


def _allow_tf32(library: Any) -> None:
    library.allow_tf32 = True


def _switches() -> dict[str, tuple[Callable[[], str], Callable[[str], Any]]]:
    """Functions that read and set each new switch, parents before their children."""
    paths = {
        "all": "backends",
        "cuda": "backends.cudnn",  # the parent of all CUDA switches
        "cuda.matmul": "backends.cuda.matmul",
        "cuda.conv": "backends.cudnn.conv",
        "cuda.rnn": "backends.cudnn.rnn",
        "mkldnn": "backends.mkldnn",
        "mkldnn.matmul": "backends.mkldnn.matmul",
        "mkldnn.conv": "backends.mkldnn.conv",
        "mkldnn.rnn": "backends.mkldnn.rnn",
    }
    found: dict[str, tuple[Callable[[], str], Callable[[str], Any]]] = {}
    for name, path in paths.items():
        holder = attribute(torch, path, "torch")
        found[name] = partial(getattr, holder, "fp32_precision"), partial(setattr, holder, "fp32_precision")
    # assigning to the attribute of mkldnn would set the switch of all backends
    set_flags = attribute(torch, "backends.mkldnn.set_flags", "torch")
    found["mkldnn"] = found["mkldnn"][0], lambda value: set_flags(_fp32_precision=value)
    return found


def _value(read: Callable[[], Any]) -> Any:
    """The value of an old switch; None if it cannot be read because new ones were used."""
    with warnings.catch_warnings(action="ignore"):  # some versions advise against reading it
        try:
            return read()
        except RuntimeError:
            return None
