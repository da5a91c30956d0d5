"""The pages' examples: found, run in a folder of real models, and shown with what they print.

A block of ```console or ```python is run as it stands, from top to bottom of its page; a block of ```text right after
it is what it prints. Blocks in other languages (```sh, ```py) are read and not run.

cd tests
python -m support.pages              # runs all pages, writes outputs and pictures
python -m support.pages rank         # those with "rank" in their name
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import shlex
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from spectra.cli import main as spectra_command
from support import materials

DOCS = Path(__file__).resolve().parents[2] / "docs"
EXECUTED = sorted([*(DOCS / "howto").glob("*.md"), DOCS / "start.md", DOCS / "tables.md", DOCS / "gallery.md"])
PICTURES = DOCS / "gallery"
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
_STATUS = re.compile(r"#.*\bexit status (\d)")


@dataclass(frozen=True)
class Block:
    """One example, and the span of the text in the page that shows what it prints (None where nothing is shown)."""

    language: str
    code: str
    output: tuple[int, int] | None


def blocks(text: str) -> Iterator[Block]:
    """The page's blocks in their order; those that show outputs belong to the block before them."""
    found = list(_FENCE.finditer(text))
    for block, after in zip_longest(found, found[1:]):
        shown = after and after[1] == "text" and not text[block.end() : after.start()].strip()
        if block[1] in ("console", "python"):
            yield Block(block[1], block[2], after.span(2) if after and shown else None)


def printed(text: str, folder: Path) -> Iterator[tuple[Block, str]]:
    """Each block with what it prints now, run in the folder.

    Raises:
        AssertionError: a command did not end as the page says, or Python raised.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    before = Path.cwd()
    os.chdir(folder)
    try:
        for block in blocks(text):
            yield block, _console(block.code) if block.language == "console" else _python(block.code, names)
    finally:
        os.chdir(before)


def _console(code: str) -> str:
    """What the commands print to stdout."""
    printed = ""
    for line in code.replace("\\\n", " ").splitlines():
        words = [name for word in shlex.split(line, comments=True) for name in _expanded(word)]
        if not words:
            continue
        assert words[0] == "spectra", f"{line}: only spectra is run; what else a page says is a block of sh"
        result = CliRunner().invoke(spectra_command, words[1:], env={"COLUMNS": "110"})
        expected = _STATUS.search(line)
        assert result.exit_code == int(expected[1] if expected else 0), f"{line}\n{result.output}"
        assert "Traceback" not in result.output, line
        printed += result.stdout
    return printed


def _expanded(word: str) -> list[str]:
    """As a shell does: a pattern is the files that it means, if there are any."""
    if "*" not in word or word.startswith("-"):
        return [word]
    return sorted(str(path) for path in Path().glob(word)) or [word]


def _python(code: str, names: dict[str, Any]) -> str:
    """What the code prints; as in a notebook, the last expression is shown."""
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            exec(compile(tree, "<page>", "exec"), names)
            value = eval(compile(ast.Expression(last.value), "<page>", "eval"), names) if last else None
        except Exception:  # noqa: BLE001 - whatever an example raises is a fault of the page
            raise AssertionError(f"{code}\n{traceback.format_exc()}") from None
    return out.getvalue() + ("" if value is None else f"{value!r}\n")


@contextlib.contextmanager
def folder_with(models: Path) -> Iterator[Path]:
    """A folder for one page, in which the models lie."""
    with tempfile.TemporaryDirectory() as name:
        for path in models.iterdir():
            (Path(name) / path.name).symlink_to(path.resolve())
        yield Path(name)


def rewritten(text: str, models: Path, pictures: Path) -> str:
    """The page with what its examples print now; what they draw into gallery/ is copied to `pictures`."""
    with folder_with(models) as folder:
        (folder / "gallery").mkdir()
        changes = [(block.output, out) for block, out in printed(text, folder) if block.output]
        for path in (folder / "gallery").iterdir():
            shutil.copy(path, pictures)
    for (start, stop), out in reversed(changes):
        text = text[:start] + "\n".join(line.rstrip() for line in out.splitlines()) + "\n" + text[stop:]
    return text


def main(word: str = "") -> None:
    """Run the pages whose name holds the word and write them."""
    import matplotlib as mpl

    mpl.use("Agg")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        materials.make(Path(name))
        for path in EXECUTED:
            if word in path.name:
                path.write_text(rewritten(path.read_text(), Path(name), PICTURES))


if __name__ == "__main__":
    main(*sys.argv[1:])
