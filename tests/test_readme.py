"""What the README says is true."""

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = re.findall(
    r"^lightning-mnn(?: .*)?$", "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)), re.MULTILINE
)


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0")  # Lightning, of loggers that are not installed
@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(code):
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})  # noqa: S102


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_compose(line):
    words = line.split("#")[0].split()[1:]
    overrides = [word for word in words if word != "-m"]
    first = [re.sub(r"=([^\[\],]+),.*", r"=\1", word) for word in overrides]  # of a sweep, its first job
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        compose("config", [word for word in first if not word.startswith("-")])


def test_there_is_something_to_test_and_links_lead_somewhere():
    assert len(PYTHON) >= 2
    assert len(COMMANDS) >= 4
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
