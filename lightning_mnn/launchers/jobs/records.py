"""The launcher's records of a sweep: ``sweep.json``, its command, and ``job.json``, a job's result."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from lightning_mnn.callbacks.environment import VARIABLE
from lightning_mnn.utilities.files import write_json

if TYPE_CHECKING:
    from omegaconf import DictConfig

SWEEP_RECORD = "sweep.json"
JOB_RECORD = "job.json"
_PLAIN_VALUE = re.compile(r"(?!(null|true|false|inf|nan)$)[a-z/][\w./-]*", re.ASCII | re.IGNORECASE)


class JobState(StrEnum):
    """State of a job.

    Attributes:
        WAITING: not started.
        RUNNING: its process runs.
        FINISHED: it returned.
        RETURNED: (in ``job.json`` only) it returned a value that JSON cannot represent, so a resumed sweep runs it
            again.
        FAILED: it raised an error, or something other than the launcher ended its process.
        INTERRUPTED: the launcher ended it, on Ctrl-C or SIGTERM.
        KEPT: it had finished when the sweep was resumed.
    """

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    RETURNED = "returned"
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    KEPT = "kept"


@dataclass(frozen=True)
class SweepCommand:
    """The command line of a sweep.

    Attributes:
        program: the words that start the program, such as ``("python", "src/train.py")``.
        arguments: all other words.
        folder: the folder in which the command was run.
        resume: the override that resumes a sweep of this program; empty: all jobs run again.
        environment: environment variables that change what the jobs do.
    """

    program: tuple[str, ...]
    arguments: tuple[str, ...]
    folder: str
    resume: str
    environment: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of_this_process(cls, config: DictConfig) -> SweepCommand:
        """The command that started this process, whose sweep has this config."""
        if isinstance(OmegaConf.select(config, "resume"), bool):  # the program has such a key, which the launcher reads
            resume = "resume=true"
        else:
            launcher = OmegaConf.select(config, "hydra.launcher")
            resume = "" if launcher is not None and "resume" not in launcher else "hydra.launcher.resume=true"
        environment = {VARIABLE: os.environ[VARIABLE]} if VARIABLE in os.environ else {}
        return cls(_program(), tuple(sys.argv[1:]), os.getcwd(), resume, environment)  # noqa: PTH109 (for JSON)

    @classmethod
    def read(cls, sweep: Path) -> SweepCommand | None:
        """The command that is recorded in a sweep's folder; None: there is none, or it cannot be read."""
        found = read_record(sweep / SWEEP_RECORD)
        try:
            words = {key: tuple(map(str, found[key])) for key in ("program", "arguments")}
            environment = {str(key): str(value) for key, value in dict(found.get("environment") or {}).items()}
            return cls(**words, folder=str(found["folder"]), resume=str(found["resume"]), environment=environment)
        except (KeyError, TypeError, ValueError):
            return None

    def write(self, sweep: Path) -> None:
        """Write the command to the sweep's folder."""
        sweep.mkdir(parents=True, exist_ok=True)
        write_json(sweep / SWEEP_RECORD, asdict(self))

    def resumed(self, sweep: Path) -> str:
        """The command line, for a shell in the current folder, that resumes the sweep in a folder.

        >>> command = SweepCommand(("python", "train.py"), ("-m", "x=1,2"), os.getcwd(), "hydra.launcher.resume=true")
        >>> command.resumed(Path("out/today"))
        'python train.py -m x=1,2 hydra.launcher.resume=true hydra.sweep.dir=out/today'
        """
        path, here = sweep.absolute(), Path(self.folder)
        given = path.relative_to(here) if path.is_relative_to(here) else path
        where = f"hydra.sweep.dir={hydra_value(str(given))}"
        replaced = {override.partition("=")[0] for override in (self.resume, where)} | {"hydra.launcher.resume"}
        arguments = [word for word in self.arguments if word.partition("=")[0].lstrip("+") not in replaced]
        words = [*self.program, *arguments, *([self.resume] if self.resume else []), where]
        variables = [f"{name}={shlex.quote(value)} " for name, value in self.environment.items()]
        elsewhere = "" if here == Path.cwd() else f"cd {shlex.quote(self.folder)} && "
        return elsewhere + "".join(variables) + shlex.join(words)


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if there is no file yet, or its content is not a JSON object."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def hydra_value(text: str) -> str:
    """Text as the value of an override, quoted if Hydra would interpret it differently.

    >>> print(hydra_value("outputs/a-1"), hydra_value("1e5"), hydra_value("a, b"))
    outputs/a-1 '1e5' 'a, b'
    """
    if _PLAIN_VALUE.fullmatch(text):
        return text
    return "'" + re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), text) + "'"


def recorded(value: Any) -> Any:
    """A job's return value in a form for JSON: tensors and tuples as numbers and lists, nan and inf as text.

    >>> recorded({"loss": float("nan"), "sizes": (1, 2)})
    {'loss': 'nan', 'sizes': [1, 2]}

    Raises:
        TypeError: JSON cannot represent it.
    """
    if hasattr(value, "shape") and hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {_key(key): recorded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [recorded(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(float(value))
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"JSON cannot represent a {type(value).__name__}")


def returned(recorded_value: Any) -> Any:
    """A job's return value, restored from what :func:`recorded` made of it.

    >>> returned(["inf", "word", 2])
    [inf, 'word', 2]
    """
    if isinstance(recorded_value, dict):
        return {key: returned(item) for key, item in recorded_value.items()}
    if isinstance(recorded_value, list):
        return [returned(item) for item in recorded_value]
    return float(recorded_value) if recorded_value in ("nan", "inf", "-inf") else recorded_value


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"JSON cannot represent a key that is a {type(key).__name__}")
    return key


def _program() -> tuple[str, ...]:
    """The words that started this program, up to its arguments."""
    given = sys.argv[1:]
    words = sys.orig_argv[: len(sys.orig_argv) - len(given)]
    if [*words, *given] != sys.orig_argv:  # the arguments were changed after the start
        words = [sys.executable, sys.argv[0]]
    script = Path(words[-1])
    installed = shutil.which(script.name)
    if len(words) == 2 and installed is not None and script.exists() and script.samefile(installed):
        return (script.name,)
    return tuple(words)
