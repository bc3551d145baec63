"""Let docstrings read well both in a terminal and on the site: an extension of griffe, which reads them for mkdocstrings.

A formula stands in an indented block after "::". Markdown knows such blocks without it, and would show both colons.
"""

import re

import griffe


class Colons(griffe.Extension):
    """Show the "::" before an indented block as one colon."""

    def on_instance(self, *, obj, **kwargs):
        """Change the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"::\n\n", ":\n\n", obj.docstring.value)
