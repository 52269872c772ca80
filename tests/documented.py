"""What the reference pages list: logged names and keys of the files, to compare with what the code writes."""

import re
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def page(name):
    """The text of a page of the documentation."""
    return (DOCS / name).read_text()


def undocumented_names(names):
    """Those of the logged names that the page does not list: ``pattern/<layer>/flips`` stands for one of each layer."""
    spans = re.findall(
        r"`((?:train|val|test|minimum|pattern|gradient|volume)/[^`\s]+)`", page("reference/logged-names.md")
    )
    known = [re.compile(re.sub(r"<[^<>]+>", "[^/]+", re.sub(r"([.^$*+?()|])", r"\\\1", span))) for span in spans]
    return [name for name in sorted(names) if not any(one.fullmatch(name) for one in known)]


def undocumented_keys(file, keys):
    """Those of the keys that the section of a file, such as ``summary.json``, does not list in its table."""
    _, _, section = page("reference/files.md").partition(f"\n## `{file}`\n")
    assert section, file
    rows = re.findall(r"^\| (`.*?) \|", section.partition("\n## ")[0], re.MULTILINE)
    known = {key for row in rows for key in re.findall(r"`(\w+)`", row)}
    return sorted(set(keys) - known)
