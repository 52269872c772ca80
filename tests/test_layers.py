"""Nothing imports upwards, and heavy or optional packages stay where they belong."""

import ast
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


def test_help_does_not_wait_for_torch():
    code = "import sys, lightning_mnn.app; assert not {'torch', 'wandb', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
