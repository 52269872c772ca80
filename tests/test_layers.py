"""Nothing imports upwards or in circles, folders stay small, and heavy or optional packages stay where they belong."""

import ast
import re
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lightning_mnn"
FLOORS = (  # folders from the ground up: a module imports from lower ones, and from its own folder
    ("utilities.compat", "utilities", "verdicts", "findings"),
    ("config", "advice", "landscape", "data.loaders", "loggers", "runs.processes", "launchers.warm"),
    ("landscape.regions", "landscape.kinks", "landscape.vitals", "metrics", "data", "data.images", "callbacks.trainer"),
    ("landscape.minima", "landscape.volumes", "landscape.curvature"),
    ("landscape.volumes.rare_events",),
    ("landscape.minima.models.equations",),
    ("landscape.minima.models",),
    ("landscape.slices",),
    ("figures", "callbacks.evaluation"),
    ("callbacks.evidence.models",),
    (
        "callbacks.evidence",
        "callbacks.patterns",
        "callbacks.volumes",
        "figures.report_page",
        "figures.slices",
        "figures.experiments",
    ),
    ("callbacks",),
    ("callbacks.slices",),
    ("model",),
    ("launchers.jobs",),
    ("launchers", "runs"),
    ("sweeps",),
    ("tasks",),
    ("app", "results"),
    ("__main__",),
)
FLOOR = {folder: floor for floor, folders in enumerate(FLOORS) for folder in folders}
KNOW_HYDRA = ("config", "launchers", "runs", "sweeps", "tasks", "app", "results", "__main__")
MOST_MODULES = 10  # of a folder
MOST_LINES = 515  # of a module
COMPAT = "lightning_mnn.utilities.compat"
OF_TORCH = (f"{COMPAT}.torch_internals", f"{COMPAT}.precision")
MODULES = [path for path in PACKAGE.rglob("*.py") if "conf" not in path.relative_to(PACKAGE).parts]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").rstrip(".")


NAMES = {name_of(path) for path in MODULES}
PACKAGES = {name_of(path) for path in MODULES if path.stem == "__init__"}


def folder_of(name: str) -> str:
    return name.rpartition(".")[0] or name


def floor_of(name: str) -> int:
    """That of a module's folder; of a package, which hands on names, that of the highest folder in it."""
    if name in PACKAGES:
        return max(floor for folder, floor in FLOOR.items() if f"{folder}.".startswith(f"{name}."))
    return FLOOR[folder_of(name)]


def imports(path: Path, *, top_level: bool = False):
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """Modules of the package that a module imports, for its types too; a package where it takes a name from that."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "lightning_mnn":
            source = node.module.removeprefix("lightning_mnn").lstrip(".")
            inner = {f"{source}.{alias.name}".lstrip(".") for alias in node.names}
            found |= {name if name in NAMES else source for name in inner}
    return found - {""}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_down(path):
    name = name_of(path)
    if path.stem != "__init__":
        for other in own_imports(path):
            same = other not in PACKAGES and folder_of(other) == folder_of(name)
            assert same or floor_of(other) < floor_of(name), other
    part = name.split(".")[0]
    for imported in imports(path):
        pieces = imported.split(".")
        if part == "landscape":
            assert pieces[0] not in ("pytorch_lightning", "hydra", "wandb", "torchmetrics"), imported
            assert not imported.startswith(COMPAT) or imported.startswith(OF_TORCH), imported
        if part not in KNOW_HYDRA and path.stem != "hydra_internals":
            assert pieces[0] not in ("hydra", "omegaconf"), imported
    assert not any(imported.split(".")[0] == "wandb" for imported in imports(path, top_level=True))


def test_no_modules_import_each_other_in_circles():
    TopologicalSorter({name_of(path): own_imports(path) for path in MODULES if path.stem != "__init__"}).prepare()


def test_folders_and_modules_stay_small():
    modules = [path for path in MODULES if path.stem != "__init__"]
    assert {folder: n for folder, n in Counter(path.parent for path in modules).items() if n > MOST_MODULES} == {}
    lengths = {path: len(path.read_text().splitlines()) for path in modules}
    assert {path: length for path, length in lengths.items() if length > MOST_LINES} == {}


INTERNAL = re.compile(
    r"hydra\.core\.singleton|hydra_plugins\.(?!lightning_mnn)|multiprocessing\.(spawn|popen|util|resource_tracker)"
    r"|(pytorch_lightning|lightning\.pytorch)\.(loops|trainer\.(?!$))|wandb\.sdk|wandb_workspaces\..*internal"
)  # modules that no documentation describes
PRIVATE = re.compile(r"_(?!_)\w*[^_\W]")  # a name that begins, and does not end, with an underscore
PUBLIC_ALL_THE_SAME = {"_fields", "_replace", "_asdict", "_exit"}  # of named tuples, of os
ENDS_OF_COLUMNS = {"_low", "_high", "_hits", "_trials", "_interpolating"}
LIBRARIES_LOOPS = {"fit_loop", "validate_loop", "epoch_loop"}  # of a Trainer, whose parts are all undocumented


def private_parts(source: str) -> set[str]:
    """Private parts of other libraries that a module uses: by attributes, by names in texts, by what it imports."""
    tree = ast.parse(source)
    of_own_objects = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
    }
    own = of_own_objects | {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= PUBLIC_ALL_THE_SAME | ENDS_OF_COLUMNS
    # In an f-string only what it begins with can be the beginning of a name.
    later = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values[1:]}
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) if name in LIBRARIES_LOOPS or (PRIVATE.fullmatch(name) and name not in own):
                found.add(ast.unparse(node))
            case ast.Constant(value=str(name)) if PRIVATE.fullmatch(name) and name not in own and id(node) not in later:
                found.add(repr(name))
            case ast.Import() | ast.ImportFrom():
                names = [alias.name for alias in node.names]
                if isinstance(node, ast.ImportFrom):
                    names = [node.module, *(f"{node.module}.{name}" for name in names)]
                for name in names:
                    private = any(PRIVATE.fullmatch(part) for part in name.split("."))
                    if not name.startswith("lightning_mnn") and (private or INTERNAL.match(name)):
                        found.add(name)
    return found


@pytest.mark.parametrize(
    "line",
    [
        "module._forward_hooks",
        "torch._C.DisableTorchFunction()",
        "getattr(run, '_local_step', 0)",
        "vars(module)['_parameters']",
        "trainer.fit_loop.epoch_progress",
        "from hydra._internal.core_plugins.basic_sweeper import BasicSweeper",
        "from hydra.core.singleton import Singleton",
        "import multiprocessing.spawn",
        "from pytorch_lightning.trainer.connectors.signal_connector import _SignalConnector",
        "from torch import _dynamo",
    ],
)
def test_private_parts_are_found(line):
    assert private_parts(line)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_private_parts_of_libraries_are_used_in_one_place(path):
    if "compat" not in path.relative_to(PACKAGE).parts:
        assert private_parts(path.read_text()) == set()
        assert "noqa: SLF" not in path.read_text()


HEAVY = {"torch", "numpy", "scipy", "pytorch_lightning", "torchmetrics", "wandb", "matplotlib", "zarr", "pyarrow"}


@pytest.mark.parametrize(
    "code",
    [
        "sys.argv[1:] = ['--help']; from lightning_mnn.app import main; main()",
        "import lightning_mnn.launchers.jobs.job, lightning_mnn.launchers.jobs.calls",  # what a sweep's launcher needs
        "import lightning_mnn.launchers.jobs.devices, lightning_mnn.launchers.warm.client",
    ],
)
def test_help_and_launchers_do_not_wait_for_torch(code):
    code = f"""
import atexit, sys
atexit.register(lambda: print(sorted({HEAVY} & set(sys.modules)), file=sys.stderr))
{code}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"
