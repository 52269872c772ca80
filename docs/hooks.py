"""What the site takes from elsewhere in the repository: the figures of the reference runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "outputs" / "reference"


def on_files(files: Files, config: Any) -> Files:
    """Add the figures, as ``figures/<run>/<name>.png``; git holds them once, in ``outputs/reference``."""
    for path in sorted(REFERENCE.rglob("*.png")):
        name = f"figures/{path.relative_to(REFERENCE).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files
