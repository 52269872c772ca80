"""The types of the config's values. Hydra uses them to refuse a wrong value when it composes a command.

Each class lists the keys of a node of ``conf/`` with their types; the files there contain the values. A node may have
more keys than its class; the object that is built from the node checks those.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, AnyNode, BooleanNode, DictConfig, FloatNode, IntegerNode, ListConfig, StringNode

_NODES: dict[Any, Any] = {bool: BooleanNode, int: IntegerNode, float: FloatNode, str: StringNode}
_WORDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_PLURALS: dict[Any, str] = {int: "whole numbers", float: "numbers", str: "texts"}


@dataclass
class Config:
    """The top level."""

    task: str
    name: Any  # a name may be a number
    run_dir: str
    seed: int
    dtype: str
    replicas: int
    tier: str
    threads: int | None
    ckpt_path: str | None
    resume: Any  # not bool: Hydra would accept "yes" as true
    folder: str | None
    sweep: str | None
    x: str | None
    y: Any  # a column or a list of them
    color: str | None
    band: str
    watch: bool
    report: bool
    figure: bool | None
    plane: str
    dry_run: bool
    dashboard: Any


@dataclass
class Model:
    """``model``: arguments of :class:`~lightning_mnn.MNN`."""

    _target_: str
    input_dim: int | None
    hidden_dims: list[int]
    negative_slope: float
    replicas: int
    optimizer: Any
    schedule: Any
    frozen: list[str]
    threshold: float | None
    regression: bool
    dtype: str
    seed: int
    default_callbacks: bool


@dataclass
class Data:
    """``data``: what all data sets have."""

    _target_: str
    label_noise: float
    random_labels: bool
    batch_size: int | None
    shuffle: bool
    replicas: int
    seed: int
    dtype: str


@dataclass
class Gaussian(Data):
    """``data=gaussian``: arguments of :class:`~lightning_mnn.data.GaussianData`."""

    num_samples: int
    input_dim: int
    labels: str
    teacher_width: int
    num_test: int


@dataclass
class Arrays(Data):
    """``data=arrays``: arguments of :class:`~lightning_mnn.data.ArrayFileData`."""

    file: str
    target: str | None
    labels: str | None
    num_samples: int | None
    test_fraction: float
    split_seed: int


@dataclass
class Images(Data):
    """What all data sets of images have."""

    root: str
    groups: Any
    labels: str
    whiten: float | None
    equal_norms: bool
    residency: str
    storage: str | None
    materialise: bool
    cache: str | None
    buffer_bytes: int
    num_samples: int | None
    test_fraction: float
    split_seed: int


@dataclass
class Archive(Images):
    """``data=mnist`` and ``data=cifar10``: arguments of the classes in :mod:`lightning_mnn.data.images.vision`."""

    part: str
    download: bool


@dataclass
class ImageFolder(Images):
    """``data=image_folder``: arguments of :class:`~lightning_mnn.data.ImageFolderData`."""

    size: int
    colour: str
    classes: Any
    store: str | None
    skip_corrupt: bool
    test_root: str | None
    workers: int | None


@dataclass
class Adam:
    """``optimizer=adam``."""

    name: str
    lr: float
    betas: list[float]
    eps: float
    weight_decay: float
    fused: bool | None


@dataclass
class SGD:
    """``optimizer=sgd``."""

    name: str
    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float


@dataclass
class LBFGS:
    """``optimizer=lbfgs``."""

    name: str
    lr: float
    max_iter: int
    history_size: int
    line_search_fn: str | None


@dataclass
class ExponentialTail:
    """``schedule=exponential_tail``."""

    name: str
    hold: float
    final_factor: float


@dataclass
class OneCycle:
    """``schedule=one_cycle``."""

    name: str
    warmup: float
    start_factor: float
    final_factor: float


@dataclass
class Trainer:
    """``trainer``: arguments of Lightning's Trainer."""

    _target_: str
    default_root_dir: str
    max_epochs: int | None
    accelerator: Any  # a name, or an object by its _target_; so is the strategy
    strategy: Any
    devices: Any  # a number, a list of them, or auto
    num_nodes: int
    log_every_n_steps: int
    enable_model_summary: bool
    use_distributed_sampler: bool
    limit_val_batches: Any  # a number of batches, or a fraction


@dataclass
class Scan:
    """``scan``: settings of the task ``scan``."""

    input_dims: list[int]
    hidden_layers: list[int]
    samples_per: str
    ratios: list[float]
    labels: str
    negative_slope: float
    max_epochs: int
    replicas_per_part: int
    processes: int | None
    figure: str


@dataclass
class CensusSettings:
    """``census``: settings of the task ``census``."""

    labels: str
    negative_slopes: list[float]
    epsilons: list[float]
    max_nodes: int
    scans: Any
    splitting: Any
    parts: int
    processes: int | None


@dataclass
class InterpolatorSettings:
    """``interpolators``: settings of the task ``interpolators``."""

    num_samples: list[int]
    input_dim: int
    networks: Any  # widths of the hidden layers of each network
    negative_slope: float
    bias: bool
    label_noise: list[float]
    teacher: Any  # widths of its hidden layers, or null
    num_test: int
    data_sets: int
    particles: int
    runs: int
    steps: int
    trained: Any
    replicas: int
    max_steps: int
    processes: int | None


# By the name that the defaults lists in conf/ use, as /schema/NAME.
SCHEMAS: dict[str, type] = {
    "config": Config,
    "model": Model,
    "gaussian": Gaussian,
    "arrays": Arrays,
    "archive": Archive,
    "image_folder": ImageFolder,
    "adam": Adam,
    "sgd": SGD,
    "lbfgs": LBFGS,
    "exponential_tail": ExponentialTail,
    "one_cycle": OneCycle,
    "trainer": Trainer,
    "scan": Scan,
    "census": CensusSettings,
    "interpolators": InterpolatorSettings,
}

# Nodes of the config, and the classes that each may have; "" is the top level.
_PLACES: dict[str, tuple[type, ...]] = {
    "": (Config,),
    "model": (Model,),
    "data": (Gaussian, Arrays, Archive, ImageFolder),
    "optimizer": (Adam, SGD, LBFGS),
    "schedule": (ExponentialTail, OneCycle),
    "trainer": (Trainer,),
    "scan": (Scan,),
    "census": (CensusSettings,),
    "interpolators": (InterpolatorSettings,),
}


def schema(keys: type) -> DictConfig:
    """A node with typed missing values, to which other keys can be added.

    The structured config that OmegaConf makes of a dataclass would refuse other keys, also from files.

    >>> schema(OneCycle)
    {'name': '???', 'warmup': '???', 'start_factor': '???', 'final_factor': '???'}
    """
    return DictConfig({name: _typed(annotation) for name, annotation in get_type_hints(keys).items()})


def needed(key: str) -> str | None:
    """The type that a key's value must have, in words; None for a key without a type.

    >>> needed("optimizer.betas"), needed("threads"), needed("trainer.devices")
    ('a list of numbers', 'a whole number or null', None)
    """
    node, _, name = key.rpartition(".")
    found = [get_type_hints(keys)[name] for keys in _PLACES.get(node, ()) if name in get_type_hints(keys)]
    if not found:
        return None
    kind, optional = _parts(found[0])
    if get_origin(kind) is not list and kind not in _WORDS:
        return None
    words = f"a list of {_PLURALS[get_args(kind)[0]]}" if get_origin(kind) is list else _WORDS[kind]
    return f"{words} or null" if optional else words


def _typed(annotation: Any) -> Any:
    kind, optional = _parts(annotation)
    if get_origin(kind) is list:
        return ListConfig(MISSING, element_type=get_args(kind)[0], is_optional=optional)
    return _NODES[kind](MISSING, is_optional=optional) if kind in _NODES else AnyNode(MISSING)


def _parts(annotation: Any) -> tuple[Any, bool]:
    """A type without None, and whether it is optional."""
    kinds = get_args(annotation)
    if NoneType not in kinds:
        return annotation, False
    (kind,) = (one for one in kinds if one is not NoneType)
    return kind, True


def register() -> None:
    """Register the types with Hydra. The package of the configs calls this, so that all its users have the types."""
    for name, keys in SCHEMAS.items():
        ConfigStore.instance().store(group="schema", name=name, node=schema(keys), provider="lightning_mnn")
