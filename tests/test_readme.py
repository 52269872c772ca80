"""What the README says is true."""

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
COMMANDS = re.findall(r"^lightning-mnn(?: .*)?$", SHELL, re.MULTILINE)


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0")  # Lightning, of loggers that are not installed
@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(code):
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})  # noqa: S102


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_compose(line):
    words = shlex.split(line.split(" > ")[0], comments=True)[1:]
    overrides = OverridesParser.create().parse_overrides([word for word in words if not word.startswith("-")])
    ((job, *_),) = BasicSweeper.split_arguments(overrides, None)  # the first job of a sweep
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        compose("config", list(job))


def test_there_is_something_to_test_and_links_lead_somewhere():
    assert len(PYTHON) >= 2
    assert len(COMMANDS) >= 4
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
