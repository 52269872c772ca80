"""PatternStore: activation patterns of a run on disk, one snapshot per recorded step."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch
import zarr

from lightning_mnn.landscape.pattern import PackedPattern
from lightning_mnn.utilities.files import DamagedFileError, relative

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_PREFIX = "step_"
_PLAIN_BYTES = 1 << 16  # arrays up to this size are not compressed
_descriptions: dict[Any, tuple[dict[str, Any], dict[str, str]]] = {}  # of a group and its arrays, by their form
_FLAT: dict[str, Any] = {"name": "default", "separator": "."}  # one file c.0.0, no folders


class PatternStore:
    """A zarr group with one subgroup per recorded step, ``step_000000100``, which contains one array of bits per layer.

    An array is uint8 (..., N, ⌈width/8⌉), and its attribute ``width`` is the number of units; unit ``8 b + j`` is bit
    ``j``, the least significant first, of byte ``b``. If units have more than two pieces (attribute ``num_pieces``),
    the array is (digits, N, ⌈width/8⌉), the least significant digit of the piece first. The attribute ``layer`` is the
    layer's name. The array has the same name, in which characters that a path does not allow are escaped as in a URL
    (``/`` is ``%2F``). Attributes of the group: ``step``, ``epoch`` and ``digest``. An array is a folder of two
    files, its description and its bits, compressed if they are more than 64 KiB; stores of earlier versions have the
    bits in folders within it, and can be read, too. A snapshot is written under another name and then renamed, so
    that every visible snapshot is complete, also after a kill.

    Args:
        path: folder of the group, ``….zarr``.

    >>> import tempfile
    >>> from lightning_mnn.landscape import ActivationPattern
    >>> store = PatternStore(tempfile.mkdtemp() + "/patterns.zarr")
    >>> pattern = ActivationPattern(torch.tensor([[True, False], [False, False]]))
    >>> store.write(step=3, epoch=1, patterns={"layer_1": pattern.pack()}, digest="abc")
    >>> store.steps, bool((store.read(3)["layer_1"].active == pattern.active).all())
    ([3], True)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def steps(self) -> list[int]:
        """The recorded steps, ascending."""
        if not self.path.is_dir():
            return []
        return sorted(int(p.name.removeprefix(_PREFIX)) for p in self.path.iterdir() if p.name.startswith(_PREFIX))

    def create(self) -> None:
        """Create the group, if it does not exist."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "zarr.json").exists():
            zarr.open_group(self.path, mode="a")

    def write(self, step: int, epoch: int, patterns: Mapping[str, PackedPattern], digest: str | list[str]) -> None:
        """Add a snapshot, replacing one of the same step."""
        self.create()
        unfinished = self.path.with_name(self.path.name + ".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        attributes: dict[str, Any] = {"step": step, "epoch": epoch, "digest": digest}
        if all(pattern.bits.numel() <= _PLAIN_BYTES for pattern in patterns.values()):
            _write_plain(unfinished, attributes, patterns)
        else:
            _write_by_zarr(unfinished, attributes, patterns)
        final = self._folder(step)
        shutil.rmtree(final, ignore_errors=True)
        unfinished.replace(final)

    def check(self) -> None:
        """Check that the store and its last snapshot can be read.

        Raises:
            DamagedFileError: they cannot.
        """
        if self.path.is_dir():
            self._group(self.path)
            if self.steps:
                self.read_packed(self.steps[-1])

    def read(self, step: int) -> dict[str, Any]:
        """The patterns of one snapshot by layer: an ActivationPattern, or with more than two pieces a PiecePattern.

        Raises:
            KeyError: the step was not recorded.
        """
        packed = self.read_packed(step)
        return {name: p.unpack() if p.num_pieces == 2 else p.unpack_pieces() for name, p in packed.items()}

    def read_packed(self, step: int) -> dict[str, PackedPattern]:
        """The patterns of one snapshot by layer, at one bit per sample, unit and binary digit.

        Raises:
            KeyError: the step was not recorded.
            DamagedFileError: its files cannot be read.
        """
        if not self._folder(step).is_dir():
            raise KeyError(f"{self.path} has no step {step}; it has {self.steps}")
        group = self._group(self._folder(step))
        found = {}
        with _damage_as_error(self._folder(step)):
            for name, array in sorted(group.arrays()):
                bits = torch.from_numpy(array[...])
                layer = str(array.attrs.get("layer", name))  # older stores have none
                found[layer] = PackedPattern(
                    bits, int(str(array.attrs["width"])), int(str(array.attrs.get("num_pieces", 2)))
                )
        return found

    def attributes(self, step: int) -> dict[str, Any]:
        """``step``, ``epoch`` and ``digest`` of one snapshot."""
        return dict(self._group(self._folder(step)).attrs)

    def discard_after(self, step: int) -> None:
        """Remove the snapshots of later steps, which a run resumed from ``step`` will record again."""
        for later in self.steps:
            if later > step:
                shutil.rmtree(self._folder(later))

    def _group(self, folder: Path) -> zarr.Group:
        with _damage_as_error(folder):
            return zarr.open_group(folder, mode="r")

    def _folder(self, step: int) -> Path:
        return self.path / f"{_PREFIX}{step:09d}"


def _write_by_zarr(folder: Path, attributes: dict[str, Any], patterns: Mapping[str, PackedPattern]) -> None:
    """Write a snapshot; arrays of more than ``_PLAIN_BYTES`` are compressed."""
    group = zarr.create_group(folder, attributes=attributes)
    for name, pattern in patterns.items():
        bits = pattern.bits.cpu().numpy()
        units: dict[str, Any] = {"width": pattern.width, "num_pieces": pattern.num_pieces, "layer": name}
        options: dict[str, Any] = {"compressors": None} if bits.size <= _PLAIN_BYTES else {}
        group.create_array(
            _array_name(name), data=bits, chunks=bits.shape, attributes=units, chunk_key_encoding=_FLAT, **options
        )


def _write_plain(folder: Path, attributes: dict[str, Any], patterns: Mapping[str, PackedPattern]) -> None:
    """Write a snapshot of small arrays, with descriptions that zarr has written for another one of this form.

    zarr needs 5 to 20 ms for a snapshot, more than training between two snapshots of a small network.
    """
    form = tuple((name, tuple(p.bits.shape), p.width, p.num_pieces) for name, p in patterns.items())
    if form not in _descriptions:
        _write_by_zarr(folder, attributes, patterns)
        group = json.loads((folder / "zarr.json").read_text())
        texts = {name: (folder / _array_name(name) / "zarr.json").read_text() for name in patterns}
        if group.get("attributes") == attributes and all(_is_plain(folder, *item) for item in patterns.items()):
            _descriptions[form] = group, texts
        return
    group, texts = _descriptions[form]
    folder.mkdir()
    (folder / "zarr.json").write_text(json.dumps(group | {"attributes": attributes}))
    for name, pattern in patterns.items():
        array = folder / _array_name(name)
        array.mkdir()
        (array / "zarr.json").write_text(texts[name])
        (array / _chunk_name(pattern)).write_bytes(pattern.bits.cpu().numpy().tobytes())


def _is_plain(folder: Path, name: str, pattern: PackedPattern) -> bool:
    """Whether zarr has written the bits as they are in memory, where :func:`_write_plain` will."""
    path = folder / _array_name(name) / _chunk_name(pattern)
    return path.is_file() and path.read_bytes() == pattern.bits.cpu().numpy().tobytes()


def _chunk_name(pattern: PackedPattern) -> str:
    return ".".join(["c", *("0" for _ in pattern.bits.shape)])


@dataclass(frozen=True)
class StoredSnapshot:
    """A snapshot as a checkpoint names it: where its bits are, and a digest that identifies them.

    Attributes:
        path: path of the store.
        step: the recorded step.
        layers: names of the layers in the order of the forward pass, which a store does not keep.
        digest: digest of all layers together (see :func:`digest_of`).
    """

    path: str
    step: int
    layers: list[str]
    digest: str | list[str]

    def read(self) -> dict[str, PackedPattern]:
        """The patterns by layer, in the order of the forward pass.

        Raises:
            LostSnapshotError: they do not exist, cannot be read, or differ from those that were written.
        """
        path = Path(self.path)
        if not path.is_dir():
            raise LostSnapshotError(f"{relative(path)} does not exist")
        try:
            found = PatternStore(path).read_packed(self.step)
        except KeyError as error:
            raise LostSnapshotError(str(error.args[0])) from error
        except DamagedFileError as error:
            raise LostSnapshotError(f"{relative(error.path)} is damaged ({error.reason})") from error
        patterns = {name: found[name] for name in self.layers if name in found}
        if len(patterns) != len(found) or digest_of(patterns) != self.digest:
            raise LostSnapshotError(f"step {self.step} of {relative(path)} contains other patterns")
        return patterns


def store_of_run(folder: Path, resumed_step: int | None, digest: str | list[str]) -> PatternStore:
    """The store to write: the one that a resumed run was writing in this folder, or one that does not exist yet."""
    path, version = folder / "patterns.zarr", 0
    while path.exists():
        store = PatternStore(path)
        if resumed_step in store.steps and store.attributes(resumed_step)["digest"] == digest:
            store.discard_after(resumed_step)
            return store
        version += 1
        path = folder / f"patterns-v{version}.zarr"
    return PatternStore(path)


class LostSnapshotError(LookupError):
    """A store does not contain a snapshot that a checkpoint names."""


def found_snapshot(named: StoredSnapshot, folder: Path | None) -> tuple[StoredSnapshot, dict[str, PackedPattern]]:
    """A snapshot that a checkpoint names, and its patterns: from a store in this folder, or from its old path.

    Raises:
        LostSnapshotError: they are in neither.
    """
    here = None if folder is None else replace(named, path=str((folder / Path(named.path).name).absolute()))
    if here is not None and here != named:  # the folder was moved or copied, or belongs to another version of the run
        try:
            return here, here.read()
        except LostSnapshotError:
            pass
    return named, named.read()


def digest_of(patterns: Mapping[str, PackedPattern]) -> str | list[str]:
    """Digest that identifies the region: of all layers together; of one layer its own; with replicas, a list of R."""
    by_layer = [pattern.digest() for pattern in patterns.values()]
    if len(by_layer) == 1:
        return by_layer[0]
    rows = [[digest] if isinstance(digest, str) else digest for digest in by_layer]
    joint = [
        hashlib.blake2b("".join(digests).encode(), digest_size=16).hexdigest() for digests in zip(*rows, strict=True)
    ]
    return joint if isinstance(by_layer[0], list) else joint[0]


@contextmanager
def _damage_as_error(folder: Path) -> Iterator[None]:
    """Turn errors of zarr into one that names the folder of the files."""
    try:
        yield
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DamagedFileError(folder / "zarr.json", reason, "delete the store to continue without it") from error


def _array_name(layer: str) -> str:
    """Name of a layer's array: one path segment, which must not begin with two underscores.

    >>> _array_name("block.F.relu.call_2"), _array_name("heads.a/b"), _array_name("__r")
    ('block.F.relu.call_2', 'heads.a%2Fb', '%5F_r')
    """
    escaped = quote(layer, safe=" ")
    return "%5F" + escaped[1:] if escaped.startswith("__") else escaped
