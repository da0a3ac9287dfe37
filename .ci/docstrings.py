"""Shows the examples of docstrings as code: an extension of griffe, which `mkdocs.yml` names.

Docstrings have a section "Example:", as the standard of this repository is; griffe knows that
section by the name "Examples:" alone, and takes the other for a paragraph.
"""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Renames the sections before they are parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Renames those of one function, class or module."""
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.M)
