"""Nothing public is undocumented: commands, options, names, metrics, columns and formats; and links lead somewhere."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from support import pages, readme
from support.checkpoints import llama_tensors, nudged, write_checkpoint

import spectra
from spectra import adapters, plots
from spectra.cli import main
from spectra.merges.report import MatrixCheck
from spectra.results.tables import row, similarity_row
from spectra.spectrum import STATUSES, Spectrum

ROOT = pages.DOCS.parent
sys.path.insert(0, str(pages.DOCS))
import generated  # noqa: E402 - docs/ is no package

PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *pages.DOCS.rglob("*.md")]
)
TEXT = {path.relative_to(ROOT).as_posix(): path.read_text() for path in PAGES}
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.M | re.S)


def commands() -> Iterator[tuple[str, click.Command]]:
    for name in main.list_commands(click.Context(main)):
        command = main.get_command(click.Context(main), name)
        assert command
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {below}", inner) for below, inner in command.commands.items())


COMMANDS = dict(commands())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_what_it_does_and_what_every_option_means(name):
    command = COMMANDS[name]
    assert command.help
    assert command.get_short_help_str()
    for option in command.params:
        if isinstance(option, click.Option) and not option.hidden:
            assert option.help, f"spectra {name} {option.opts[0]}"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_in_a_how_to_or_a_page_of_its_own(name):
    examples = "\n".join(text for path, text in TEXT.items() if path.startswith("docs/"))
    assert re.search(rf"^\s*spectra {name}\b", examples, re.M), f"no example of `spectra {name}` in docs/"


@pytest.mark.parametrize("path", TEXT)
def test_command_lines_name_commands_and_options_that_exist(path):
    for line in re.findall(r"^\s*(?:\$ )?spectra ((?:\w.*\\\n)*\w.*)$", TEXT[path], re.M):
        words = re.sub(r"\\\n", " ", line).split("#")[0].split()
        name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
        assert name in COMMANDS, line
        known = {word for option in COMMANDS[name].params for word in [*option.opts, *option.secondary_opts]}
        for word in words:
            if re.match(r"--?[a-z]", word):
                assert word.split("=")[0] in known, f"spectra {line}"


OF_OTHERS = {"--memory-limit"}  # Dask's workers


@pytest.mark.parametrize("path", [path for path in TEXT if not path.startswith(("benchmarks", "CONTRIBUTING"))])
def test_options_named_in_sentences_exist(path):
    known = {word for command in COMMANDS.values() for o in command.params for word in [*o.opts, *o.secondary_opts]}
    known |= OF_OTHERS | {"--version", "--help"}
    assert set(re.findall(r"`(--[a-z][a-z-]*)", TEXT[path])) <= known


def test_every_public_name_is_in_the_reference_with_more_than_a_name():
    shown = {name for names in generated.rooms().values() for name in names}
    assert {f"spectra.{name}" for name in spectra.__all__} - shown == {"spectra.__version__"}
    assert {f"spectra.adapters.{name}" for name in adapters.__all__} <= shown
    for name in spectra.__all__:
        value = getattr(spectra, name)
        known = value.__doc__ if callable(value) else generated.DATA.get(f"spectra.{name}")
        assert known or name == "__version__", name


@pytest.mark.parametrize("table", ["METRICS", "ALIGNMENT", "INTERFERENCE"])
def test_every_metric_says_what_it_is(table):
    found = generated.functions(getattr(spectra, table))
    for function, columns in found.items():
        assert (function.__doc__ or "").strip(), columns
        assert function.__name__ != "<lambda>", columns
    signal = {name for name in getattr(spectra, table) if name.startswith(generated.SIGNAL)}
    assert {name for columns in found.values() for name in columns} | signal == set(getattr(spectra, table))
    assert f"spectra.{table}" in TEXT["docs/metrics.md"]


def described(section: str) -> set[str]:
    """The columns in the tables of a section of docs/tables.md."""
    text = TEXT["docs/tables.md"].split(f"\n## {section}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.+?`) \|", text, re.M)
    return {name for cell in rows for name in re.findall(r"`([^`]+)`", cell)}


def test_every_column_of_summary_csv_is_described_and_no_other():
    assert described("summary.csv") == set(row(Spectrum("a", (2, 2), S=[1.0, 0.5])))


def test_every_column_of_similarity_csv_is_described_and_no_other():
    eye = [[1.0, 0.0], [0.0, 1.0]]
    one = Spectrum("a", (2, 2), S=[2.0, 1.0], U=eye, Vh=eye)
    assert described("similarity.csv") == set(similarity_row(spectra.subspace_similarity(one, one, top=1)))


def test_every_column_of_series_csv_is_described_and_no_other(tmp_path):
    write_checkpoint(tmp_path / "base", llama_tensors())
    write_checkpoint(tmp_path / "checkpoint-1", nudged(llama_tensors(), seed=1))
    table = spectra.series([tmp_path / "checkpoint-1"], tmp_path / "base", layers="v_proj")
    assert described("series.csv") == set(table.columns)


def test_every_column_of_verify_csv_is_described_and_no_other():
    assert described("verify.csv") == set(dict(MatrixCheck("layers.0.v_proj.weight", "exact")))


def test_every_status_is_described():
    section = TEXT["docs/concepts.md"].split("## Status")[1].split("## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", section, re.M)) == set(STATUSES)


def test_every_public_picture_is_in_the_gallery():
    drawn = {name for name in plots.__all__ if name.startswith(("plot_", "draw_")) or name.endswith("_figure")}
    assert {name for name in drawn & set(spectra.__all__) if name not in TEXT["docs/gallery.md"]} == set()


def test_the_table_of_formats_is_the_one_in_the_code():
    assert readme.current() == readme.table(), "run `python -m support.readme` in tests/"


@pytest.mark.parametrize("path", TEXT)
def test_links_lead_to_files_and_headings(path):
    for target in LINK.findall(CODE.sub("", TEXT[path])):
        if re.match(r"https?:|mailto:", target):
            continue
        file, _, heading = target.partition("#")
        there = ((ROOT / path).parent / file) if file else ROOT / path
        assert there.exists(), f"{path}: {target}"
        if heading and there.suffix == ".md" and "{public-names}" not in there.read_text():
            assert heading in headings(there), f"{path}: {target}"


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub and the site make them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


def test_completion_and_the_version_are_told():
    assert "_SPECTRA_COMPLETE=" in TEXT["docs/start.md"]
    assert "spectra --version" in TEXT["docs/start.md"]


def test_the_readme_is_one_screen_and_the_index_leads_to_every_how_to():
    assert len(TEXT["README.md"].splitlines()) < 70
    for path in (pages.DOCS / "howto").glob("*.md"):
        assert f"(howto/{path.name})" in TEXT["docs/index.md"], path.name
        assert f"(docs/howto/{path.name})" in TEXT["README.md"], path.name
