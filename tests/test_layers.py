"""Nothing imports upwards, and heavy or optional packages stay where they belong."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lightning_mnn"
FLOORS = {
    "utilities": 0,
    "landscape": 1,
    "seeding": 1,
    "validation": 1,
    "workers": 1,
    "gradients": 1,
    "data": 2,
    "optim": 2,
    "mnn": 2,
    "metrics": 2,
    "callbacks": 3,
    "loggers": 2,
    "bundling": 2,
    "by_environment": 3,
    "figures": 3,
    "app": 4,
    "config": 4,
    "jobs": 4,
    "launcher": 4,
    "slurm": 4,
    "tasks": 4,
    "__main__": 4,
}
COMPAT = "lightning_mnn.utilities.compat"
OF_TORCH = (f"{COMPAT}.torch_internals", f"{COMPAT}.precision")
MODULES = [path for path in PACKAGE.rglob("*.py") if "conf" not in path.relative_to(PACKAGE).parts]


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, top_level: bool = False):
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_down(path):
    part = part_of(path)
    if part == "__init__":
        return
    for name in imports(path):
        pieces = name.split(".")
        if pieces[0] == "lightning_mnn" and len(pieces) > 1 and pieces[1] in FLOORS:
            allowed = FLOORS[pieces[1]] <= FLOORS[part]
            lightning_asks = part == "mnn" and pieces[1] == "callbacks"  # configure_callbacks
            assert allowed or lightning_asks, f"{part} imports {name}"
        if part == "landscape":
            assert pieces[0] not in ("pytorch_lightning", "hydra", "wandb", "torchmetrics"), name
            assert not name.startswith(COMPAT) or name.startswith(OF_TORCH), name
        if FLOORS[part] < 4 and path.stem != "hydra_internals":
            assert pieces[0] not in ("hydra", "omegaconf"), name
    assert not any(name and name.split(".")[0] == "wandb" for name in imports(path, top_level=True))


INTERNAL = re.compile(
    r"hydra\.core\.singleton|hydra_plugins\.(?!lightning_mnn)|multiprocessing\.(spawn|popen|util|resource_tracker)"
    r"|(pytorch_lightning|lightning\.pytorch)\.(loops|trainer\.(?!$))|wandb\.sdk|wandb_workspaces\..*internal"
)  # modules that no documentation describes
PRIVATE = re.compile(r"_(?!_)\w*[^_\W]")  # a name that begins, and does not end, with an underscore
PUBLIC_ALL_THE_SAME = {"_fields", "_replace", "_asdict", "_exit"}  # of named tuples, of os
ENDS_OF_COLUMNS = {"_low", "_high", "_hits", "_trials"}
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
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) if name in LIBRARIES_LOOPS or (PRIVATE.fullmatch(name) and name not in own):
                found.add(ast.unparse(node))
            case ast.Constant(value=str(name)) if PRIVATE.fullmatch(name) and name not in own:
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


def test_help_does_not_wait_for_torch():
    code = "import sys, lightning_mnn.app; assert not {'torch', 'wandb', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
