"""Write ``report.html`` from its content: the parts in this folder, joined into one file."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from lightning_mnn.figures.style import COLORS, ENDS, look_of
from lightning_mnn.utilities.files import finite, write_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lightning_mnn.verdicts import Ended

_FOLDER = "lightning_mnn.figures.report_page"
_PLACE = re.compile(r"\{\{(\w+)\}\}")  # in report.html


@dataclass(frozen=True)
class Problem:
    """A job that is not finished: its name and swept values, its status, its error, and the end of its log."""

    name: str
    status: str
    error: str = ""
    log: str = ""


@dataclass(frozen=True)
class Column:
    """A column of the table: its key, and its values as text, one for each row; ``is_number`` aligns it right."""

    key: str
    texts: Sequence[str]
    is_number: bool = False


@dataclass(frozen=True)
class Page:
    """The content of a page.

    Attributes:
        title: the heading.
        facts: (name, value) pairs at the head: folder, state, time.
        swept: (key, its distinct values) of what was swept.
        columns: the table's columns, without its check boxes.
        classes: the class of each row; None if its job has no result.
        jobs: the index of each row's job.
        common: (name, value) pairs that are the same in all results.
        notes: sentences below the table.
        problems: jobs that are not finished.
        resume: commands that finish the sweep.
        data: what the script draws: ``columns``, ``swept``, ``curves``; see ``report.js``.
        reload: seconds after which the page reloads itself; None: never.
    """

    title: str
    facts: Sequence[tuple[str, str]]
    swept: Sequence[tuple[str, str]]
    columns: Sequence[Column]
    classes: Sequence[Ended | None]
    jobs: Sequence[int]
    common: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    problems: Sequence[Problem] = ()
    resume: Sequence[str] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    reload: int | None = None


def write_page(page: Page, path: Path) -> Path:
    """Write the page atomically.

    Returns:
        The path.
    """
    write_bytes(path, html_of(page).encode(), durable=page.reload is None)
    return path


def html_of(page: Page) -> str:
    """The whole page. All texts are escaped, and a policy in it forbids everything but its own script and style."""
    script = part("report.js")
    style = part("report.css") + "".join(f"td .{end.key} {{ background: {look_of(end).color}; }}\n" for end in ENDS)
    ends = [end for end in ENDS if not end.ahead or end in page.classes]
    names = {end.key: {"name": look_of(end).name, "color": look_of(end).color} for end in ends}
    rows = {"classes": [None if one is None else one.key for one in page.classes], "jobs": list(page.jobs)}
    data = {**page.data, **rows, "names": names, "colors": COLORS, "reload": page.reload}
    parts = {
        "title": escape(page.title),
        "policy": f"default-src 'none'; style-src 'unsafe-inline'; script-src '{_digest(script)}'; img-src data:",
        "reload": "" if page.reload is None else _reload(page.reload),
        "style": style,
        "facts": pairs(page.facts),
        "swept": pairs(page.swept) or "<p>Nothing was swept.</p>",
        "resume": _resume(page.resume),
        "problems": _problems(page.problems),
        "table": _table(page),
        "notes": "".join(f"<p>{escape(note)}</p>" for note in page.notes),
        "common": f'<section id="common"><h2>The same in all results</h2>{pairs(page.common)}</section>'
        if page.common
        else "",
        "data": script_json(data),
        "script": script,
    }
    return filled("report.html", parts)


def script_json(content: Any) -> str:
    r"""JSON that can stand in a ``script`` element: no character in it can end the element.

    >>> print(script_json({"name": "</script>"}))
    {"name":"\u003c/script\u003e"}
    """
    text = json.dumps(finite(content), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def filled(name: str, parts: Mapping[str, str]) -> str:
    """A page: a file of this folder with its places filled."""
    return _PLACE.sub(lambda place: parts[place[1]], part(name))


def part(name: str) -> str:
    """The text of a file of this folder."""
    return files(_FOLDER).joinpath(name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    """The name by which a policy allows a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _reload(seconds: int) -> str:
    return f'<noscript><meta http-equiv="refresh" content="{seconds}"></noscript>'


def pairs(named: Sequence[tuple[str, str]]) -> str:
    """Names and texts, side by side."""
    if not named:
        return ""
    return f"<dl>{''.join(f'<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd></div>' for a, b in named)}</dl>"


def _resume(commands: Sequence[str]) -> str:
    if not commands:
        return ""
    lines = "\n".join(map(escape, commands))
    return (
        '<section id="resume"><h2>Resume</h2><p>Finished jobs stay as they are.</p>'
        f'<pre tabindex="0">{lines}</pre></section>'
    )


def _problems(problems: Sequence[Problem]) -> str:
    if not problems:
        return ""
    return f'<section id="problems"><h2>Jobs without a result</h2>{"".join(map(_problem, problems))}</section>'


def _problem(problem: Problem) -> str:
    head = f"<b>{escape(problem.status)}</b> {escape(problem.name)}"
    error = f'<p class="error">{escape(problem.error)}</p>' if problem.error else ""
    if not problem.log:
        return f'<div class="problem"><p>{head}</p>{error}</div>'
    log = f'<pre tabindex="0">{escape(problem.log)}</pre>'
    return f'<details class="problem"><summary>{head}</summary>{error}<p>The end of its log:</p>{log}</details>'


def _table(page: Page) -> str:
    """The table; its cells are complete without the script, which adds sorting, filters and check boxes."""
    kinds = ['<th scope="col" class="n">' if column.is_number else '<th scope="col">' for column in page.columns]
    heads = [f"{kind}{escape(column.key)}</th>" for kind, column in zip(kinds, page.columns, strict=True)]
    cells = ['<td class="n">' if column.is_number else "<td>" for column in page.columns]
    rows = []
    for number in range(len(page.classes)):
        texts = [f"{cell}{escape(column.texts[number])}" for cell, column in zip(cells, page.columns, strict=True)]
        known = page.classes[number]
        rows.append("<tr><td>" + (_dot(known) if known is not None else "") + "".join(texts))
    return (
        '<table><thead><tr><th scope="col">ended in</th>'
        + "".join(heads)
        + "</tr></thead><tbody>"
        + "\n".join(rows)
        + "</tbody></table>"
    )


def _dot(ended: Ended) -> str:
    return f'<i class="{ended.key}"></i>{escape(look_of(ended).short)}'
