"""The wheel, built by way of the sdist as releases are, holds all that the command needs."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_wheel_runs_the_command_from_an_empty_folder(tmp_path):
    subprocess.run([sys.executable, "-m", "build", "--outdir", tmp_path, ROOT], check=True, stdout=subprocess.DEVNULL)
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")  # noqa: S202 (our own)
    configs = {f"lightning_mnn/{path.relative_to(ROOT)}" for path in (ROOT / "conf").rglob("*.yaml")}
    assert configs <= names
    assert {f"lightning_mnn/figures/report_page/report.{end}" for end in ("html", "css", "js")} <= names
    assert {f"lightning_mnn/figures/report_page/model.{end}" for end in ("html", "css")} <= names
    with tarfile.open(sdist) as archive:
        sources = [name.partition("/")[2] for name in archive.getnames()]
    assert configs | {"conf/config.yaml", "tests/test_packaging.py", "Makefile"} <= set(sources)
    assert len(sources) == len(set(sources))
    assert not any(name.startswith("outputs/") for name in sources)
    assert "lightning_mnn/py.typed" in names
    (entry_points,) = (tmp_path / "site").glob("*.dist-info/entry_points.txt")
    assert entry_points.read_text().count("lightning_mnn.callbacks.environment:factory") == 2  # one for each namespace
    assert not {name.split("/")[0] for name in names} & {"conf", "tests", "outputs"}
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    where = subprocess.run(
        [sys.executable, "-c", "import lightning_mnn; print(lightning_mnn.__file__)"],
        cwd=empty, env=environment, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert str(tmp_path) in where
    subprocess.run(
        [sys.executable, "-m", "lightning_mnn", "trainer.max_epochs=3", "logger.mode=disabled"],
        cwd=empty, env=environment, check=True, capture_output=True,
    )  # fmt: skip
    assert len(list(empty.glob("outputs/quickstart/*/summary.json"))) == 1
