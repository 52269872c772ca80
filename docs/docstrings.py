"""Docstrings as the site shows them: doctests as code, Sphinx roles as plain code."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|exc|data):`~?([^`]+)`")
_DOCTEST = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)


def shown(text: str) -> str:
    """A docstring in Markdown.

    >>> print(shown("See :func:`~package.module.name`."))
    See `name`.
    """
    text = _ROLE.sub(lambda role: f"`{role[1].rpartition('.')[2]}`", text)
    return _DOCTEST.sub(lambda block: _fenced(block[0], block["indent"]), text)


def _fenced(block: str, indent: str) -> str:
    return f"{indent}```pycon\n{block}\n{indent}```"


class Docstrings(griffe.Extension):
    """Rewrites the docstrings of all objects of the package."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one."""
        del kwargs
        if obj.docstring is not None:
            obj.docstring.value = shown(obj.docstring.value)
