"""What the README and the documentation say is true.

Python blocks run, commands and configs compose, links lead somewhere. A block after a line ``<!-- not run -->`` is left
out. What the reference pages list is compared with the sources here, and with real runs in ``test_train``,
``test_ecosystem`` and ``test_host_application``.
"""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

import lightning_mnn
from tests.documented import page, undocumented_names

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SLOW = (
    "README.md",
    "docs/index.md",
    "docs/tutorials/watch-your-model.md",
    "docs/how-to/notebook.md",
)  # which train for seconds
MAX_README_LINES = 150


def blocks(language):
    """Blocks of code in a language, by page and line."""
    found = {}
    for path in PAGES:
        text = path.read_text()
        for block in re.finditer(rf"(<!-- not run -->\n)?```{language}\n(.*?)```", text, re.DOTALL):
            if not block[1]:
                line = text.count("\n", 0, block.start()) + 1
                found[f"{path.relative_to(ROOT)}:{line}"] = block[2]
    return found


def commands():
    """Commands of lightning-mnn in blocks for a shell, each once."""
    lines = "\n".join(blocks("bash").values()).replace("\\\n", " ")
    return list(dict.fromkeys(re.findall(r"^(?:\w+=\S+ |srun )*(lightning-mnn(?: .*)?)$", lines, re.MULTILINE)))


PYTHON = {
    name: pytest.param(code, id=name, marks=pytest.mark.slow if name.startswith(SLOW) else ())
    for name, code in blocks("python").items()
}


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0")  # Lightning, of loggers that are not installed
@pytest.mark.filterwarnings("ignore:.*num_training_batches. could not be determined")  # of an IterableDataset
@pytest.mark.parametrize("code", PYTHON.values())
def test_python_blocks_run(code):
    exec(compile(code, "documentation", "exec"), {"__name__": "__main__"})  # noqa: S102


@pytest.fixture
def _files_of_the_documentation(tmp_path):
    """The files whose content a block states, by its first line, are there."""
    for code in blocks("yaml").values():
        if first := re.match(r"# (\S+\.yaml)\n", code):
            path = tmp_path / first[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(code)


@pytest.mark.usefixtures("_files_of_the_documentation")
@pytest.mark.parametrize("line", commands())
def test_commands_compose(line):
    words = shlex.split(line.split(" > ")[0], comments=True)[1:]
    if "--cfg" in words:
        del words[words.index("--cfg") : words.index("--cfg") + 2]
    overrides = OverridesParser.create().parse_overrides([word for word in words if not word.startswith("-")])
    ((job, *_),) = BasicSweeper.split_arguments(overrides, None)  # the first job of a sweep
    with initialize_config_module("lightning_mnn.conf", version_base="1.3"):
        compose("config", list(job))


def test_there_is_something_to_test():
    assert len(PYTHON) >= 8
    assert len(commands()) >= 20


def test_the_readme_is_one_page():
    assert (ROOT / "README.md").read_text().count("\n") <= MAX_README_LINES


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        found = (path.parent / target).resolve()
        figure = re.search(r"(?:^|/)figures/(.+)$", target)  # which the site takes from the reference runs
        if figure and path.is_relative_to(ROOT / "docs"):
            assert found == ROOT / "docs" / "figures" / figure[1]
            found = ROOT / "outputs" / "reference" / figure[1]
        assert target.startswith("http") or found.exists(), target


def sources(suffix):
    return "\n".join(path.read_text() for path in sorted((ROOT / "lightning_mnn").rglob(f"*.{suffix}")))


def test_names_in_the_sources_are_documented():
    names = set(re.findall(r"\"((?:train|test|minimum|pattern|gradient|volume)/\w+)\"", sources("py")))
    assert len(names) > 30
    assert undocumented_names(names) == []


def test_environment_variables_are_documented():
    variables = set(re.findall(r"LIGHTNING_MNN_[A-Z]+", sources("py") + sources("yaml")))
    assert [name for name in sorted(variables) if f"`{name}`" not in page("reference/environment.md")] == []


def test_config_groups_and_their_options_are_documented():
    rows = dict(re.findall(r"^\| `([\w/]+)` \| (`.*)\|$", page("reference/configs.md"), re.MULTILINE))
    for folder in (ROOT / "conf").iterdir():
        options = {path.stem for path in folder.glob("*.yaml")} - {"default"} if folder.is_dir() else set()
        assert [option for option in sorted(options) if f"`{option}`" not in rows[folder.name]] == []


def test_the_version_is_one():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert lightning_mnn.__version__ == declared
    assert f"\nversion: {declared}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## [{declared}] - " in (ROOT / "CHANGELOG.md").read_text()
