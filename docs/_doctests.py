"""For the site: the examples at the end of docstrings become blocks of code, which Markdown takes for quotations."""

from __future__ import annotations

import re

from griffe import Extension, Object


class Doctests(Extension):
    def on_object(self, *, obj: Object, **kwargs) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"(?m)^>>> (?:.+\n?)+", r"```pycon\n\g<0>\n```", obj.docstring.value)
