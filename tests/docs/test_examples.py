"""The pages' examples run, and what they show is what the code gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support import materials, pages

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
PICTURE = re.compile(r"\((gallery/[\w-]+\.png)\)")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, real_pair: tuple[Path, Path]) -> Path:
    folder = tmp_path_factory.mktemp("models")
    materials.make(folder)
    return folder


def words(text: str) -> list[str]:
    """What is printed, without numbers and without the spaces and rules that depend on their widths."""
    return [word for word in NUMBER.sub("0", text).split() if set(word) != {"-"}]


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(text)]


@pytest.mark.parametrize("page", pages.EXECUTED, ids=lambda page: page.stem)
def test_a_page_runs_and_shows_what_it_gives(page, models):
    text = page.read_text()
    with pages.folder_with(models) as folder:
        (folder / "gallery").mkdir()
        for block, out in pages.printed(text, folder):
            if block.output:
                shown = text[slice(*block.output)]
                assert words(shown) == words(out), f"{block.code}\n\nrun `python -m support.pages` in tests/"
                assert numbers(shown) == pytest.approx(numbers(out), rel=0.05, abs=0.005), block.code
        drawn = {f"gallery/{path.name}" for path in (folder / "gallery").iterdir()}
    assert drawn == set(PICTURE.findall(text)), "each picture is drawn by the lines of its page"
    assert all((pages.DOCS / name).is_file() for name in drawn)


def test_a_wrong_output_a_wrong_status_and_a_fault_are_noticed(tmp_path):
    page = "```python\n1 + 1\n```\n```text\n3\n```\n"
    [(block, out)] = pages.printed(page, tmp_path)
    assert block.output
    assert page[slice(*block.output)] == "3\n"
    assert out == "2\n"
    with pytest.raises(AssertionError, match="no-such"):
        list(pages.printed("```console\nspectra inspect no-such\n```\n", tmp_path))
    assert list(pages.printed("```console\nspectra inspect no-such   # exit status 1\n```\n", tmp_path))
    with pytest.raises(AssertionError, match="only spectra"):
        list(pages.printed("```console\nls\n```\n", tmp_path))
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        list(pages.printed("```python\n1 / 0\n```\n", tmp_path))


def test_an_output_is_written_where_it_belongs(tmp_path):
    page = "```python\nx = 4\n```\n\n```python\nx\n```\n\n```text\n```\nEnd, and ```sh is not run:\n```sh\nls\n```\n"
    (tmp_path / "models").mkdir()
    written = pages.rewritten(page, tmp_path / "models", tmp_path)
    assert written == page.replace("```text\n```", "```text\n4\n```")
