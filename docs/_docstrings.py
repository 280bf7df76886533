"""Docstrings are written for Sphinx, as those of Optax are; the site reads Markdown."""

import re
import textwrap

import griffe


def markdown(text: str) -> str:
    """Formulas and links of reStructuredText as those of Markdown.

    And an example under the name by which the site knows that it is code.
    """
    text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.M)
    text = re.sub(
        r"^( *)\.\. math::\n((?:\1 +.*\n?|\n(?=\1 +\S))+)",
        lambda m: f"{m[1]}$$\n{textwrap.indent(textwrap.dedent(m[2]), m[1])}{m[1]}$$\n",
        text + "\n",
        flags=re.M,
    )
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    return re.sub(r"`([^`<]+?)\s*<([^`>]+)>`_", r"[\1](\2)", text).rstrip()


class Docstrings(griffe.Extension):
    """Translates each docstring before it is rendered."""

    def on_instance(self, *, obj: griffe.Object, **kwargs) -> None:
        """Translates one."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
