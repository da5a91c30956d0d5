"""What the site takes from the code: public names, metrics and their docstrings. A new name or metric needs no page."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from pygments.lexers.shell import BashLexer
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.writers.html5 import HTML5Translator

import spectra

ROOT = Path(__file__).resolve().parent.parent
# The rooms of public names, in the order of the pipeline; another room comes last, under its own name.
ROOMS = {
    "spectra.sources": "Open",
    "spectra.deltas": "Updates",
    "spectra.spectrum": "Spectra",
    "spectra.results": "Compute, compare and keep",
    "spectra.metrics": "Measure",
    "spectra.plots": "Draw",
    "spectra.report": "Report",
    "spectra.merges": "Verify a merge",
    "spectra.extraction": "Extract an adapter",
    "spectra.errors": "Errors",
}
MODULES = {"spectra.adapters": "Train: spectra.adapters", "spectra.training": "Watch training: spectra.training"}
DATA = {  # public names that are no functions and no classes
    "spectra.ALIGNMENT": "Column → metric of ΔW against W₀ ([what they are](metrics.md#against-the-base-weights)).",
    "spectra.INTERFERENCE": "Column → metric of several updates ([what they are](metrics.md#between-several-updates)).",
    "spectra.METRICS": "Column → function of a `Spectrum` ([what they are](metrics.md#of-one-update)).",
    "spectra.FORMATS": "What is read, in the order in which it is tried ([the table](formats.md)).",
}
SIGNAL = "signal_"  # the prefix of the metrics of what is above the rounding edge
_VERBATIM = re.compile(r"(``.+?``|`.+?`)")


def rooms() -> dict[str, list[str]]:
    """Title of a room → its public names, each with the module that has it."""
    found: dict[str, list[str]] = {title: [] for title in ROOMS.values()}
    for home, names in spectra._HOMES.items():
        room = ".".join(home.split(".")[:2])
        found.setdefault(ROOMS.get(room, room), []).extend(f"spectra.{name}" for name in names)
    for module, title in MODULES.items():
        known = {name.rpartition(".")[2] for names in found.values() for name in names}
        found[title] = [f"{module}.{name}" for name in importlib.import_module(module).__all__ if name not in known]
    return {title: sorted(names) for title, names in found.items() if names}


def functions(table: Mapping[str, Callable[..., Any]]) -> dict[Callable[..., Any], list[str]]:
    """Each function of a table of metrics → the columns that it makes; those of the signal alone are left out."""
    found: dict[Callable[..., Any], list[str]] = {}
    for name, metric in table.items():
        if not name.startswith(SIGNAL):
            found.setdefault(metric.func if isinstance(metric, partial) else metric, []).append(name)
    return found


def _documented(name: str) -> str:
    """The directive that shows a public name's docstring."""
    module, _, attribute = name.rpartition(".")
    value = getattr(importlib.import_module(module), attribute)
    if not callable(value):
        return f"```{{py:data}} {name}\n{DATA[name]}\n```"
    kind, options = ("autoclass", "\n   :members:") if isinstance(value, type) else ("autofunction", "")
    return f"```{{eval-rst}}\n.. {kind}:: {name}{options}\n```"


class PublicNames(SphinxDirective):
    """`public-names`: every public name, by room."""

    def run(self) -> list[nodes.Node]:
        """What stands in the directive's place."""
        parts = [f"## {title}\n\n" + "\n\n".join(map(_documented, names)) for title, names in rooms().items()]
        return self.parse_text_to_nodes("\n\n".join(parts), allow_section_headings=True)


class Metrics(SphinxDirective):
    """`metrics MODULE.TABLE`: every metric of a table, with its columns, formula and source."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """What stands in the directive's place."""
        module, _, attribute = self.arguments[0].rpartition(".")
        return self.parse_text_to_nodes("\n\n".join(_entries(getattr(importlib.import_module(module), attribute))))


def _entries(table: Mapping[str, Callable[..., Any]]) -> Iterator[str]:
    for function, columns in functions(table).items():
        named = ", ".join(f"`{column}`" for column in columns)
        told = f"```{{eval-rst}}\n.. autofunction:: {function.__module__}.{function.__qualname__}\n   :no-index:\n```"
        yield f"**{named}**\n\n{told}"


def plain(lines: list[str]) -> None:
    """Escape what is plain text in docstrings and help, |x|, a* and x_, and would be markup on the site."""
    example = False
    for i, line in enumerate(lines):
        example = line.lstrip().startswith(">>>") or (example and bool(line.strip()))
        if not example and not line.lstrip().startswith(".. "):
            parts = _VERBATIM.split(line)
            lines[i] = "".join(
                part if k % 2 else re.sub(r"([|*]|_(?!\w))", r"\\\1", part) for k, part in enumerate(parts)
            )


def help_text(lines: list[str]) -> None:
    """A command's help: what stands in lines of its own (after \\b) keeps them, the rest is plain text."""
    kept = ["   " + line[2:] if line.startswith("| ") else line for line in lines]
    verbatim = [line.startswith("| ") for line in lines]
    plain(lines)
    for i in reversed(range(len(lines))):
        if verbatim[i]:
            lines[i : i + 1] = [kept[i]] if i and verbatim[i - 1] else [".. code-block:: text", "", kept[i]]


def _mathml(node: nodes.Element, as_block: bool) -> str:
    """A formula as MathML, which browsers draw by themselves; what docutils does not know is a warning."""
    try:
        return tex2mathml(node.astext().replace(r"\dots", r"\ldots"), as_block=as_block)
    except MathError as problem:
        logging.getLogger(__name__).warning("%s in %s", problem, node.astext(), location=node)
        return escape(node.astext())


def inline_math(writer: HTML5Translator, node: nodes.math) -> None:
    """A formula inside a line."""
    writer.body.append(_mathml(node, as_block=False))
    raise nodes.SkipNode


def block_math(writer: HTML5Translator, node: nodes.math_block) -> None:
    """A formula in a line of its own."""
    writer.body.append(f'<div class="math">{_mathml(node, as_block=True)}</div>')
    raise nodes.SkipNode


def repository_links(app: Sphinx, docname: str, content: list[str]) -> None:
    """Links that are right in the repository, to what has a page of its own on the site; folders have none."""
    content[0] = _whole(docname) or content[0]
    text = re.sub(r"\]\((?:\.\./)+notebooks/", f"]({'../' * docname.count('/')}notebooks/", content[0])
    text = re.sub(r"\]\(\.\./(?:docs/)(\w)", r"](../\1", text)  # notebooks are read from a folder here
    text = re.sub(r"\]\(\.\./README\.md\)", "](../index.md)" if "/" in docname else "](index.md)", text)
    content[0] = re.sub(r"\[([^\]]+)\]\(\.\./figures/reproduction\)", r"\1", text)


def _whole(docname: str) -> str:
    """The file that a page of `docs/` only leads to, for the site; "" for every other page."""
    if docname == "contributing":
        return re.sub(r"\]\(docs/", "](", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    if docname == "benchmarks":
        text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
        tables = {name: path.read_text(encoding="utf-8") for name, path in _results().items()}
        parts = [f"## On {name}\n\n{table}" for name, table in tables.items()]
        return "\n\n".join([re.sub(r"\]\(results/([\w-]+)/table\.md\)", r"](#on-\1)", text), *parts])
    return ""


def _results() -> dict[str, Path]:
    """Machine → the table of what was measured on it."""
    return {path.parent.name: path for path in sorted((ROOT / "benchmarks" / "results").glob("*/table.md"))}


def setup(app: Sphinx) -> dict[str, bool]:
    """Make the directives known."""
    app.add_directive("public-names", PublicNames)
    app.add_directive("metrics", Metrics)
    app.connect("autodoc-process-docstring", lambda *given: plain(given[-1]), priority=900)
    for part in ("description", "options", "arguments", "epilog"):
        app.connect(f"sphinx-click-process-{part}", lambda *given: help_text(given[-1]))
    app.add_lexer("console", BashLexer)  # commands without a prompt, so that they can be copied
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))
    app.connect("source-read", repository_links)
    return {"parallel_read_safe": True}
