"""`spectra report`: one HTML page about stored results, to look at and to send."""

from __future__ import annotations

import click

from spectra.cli.options import layer_option


@click.command("report", short_help="One HTML page about stored results.")
@click.argument("directories", nargs=-1, required=True, metavar="DIR…", type=click.Path())
@click.option(
    "--out", type=click.Path(dir_okay=False), metavar="PAGE", help="The file to write, as page.html.  [required]"
)
@layer_option
@click.option("--label", "labels", multiple=True, help="Name of a DIR on the page, in order.  [default: its folder]")
@click.option("--title", default="", metavar="TEXT", help="Title of the page.  [default: the labels]")
def command(
    directories: tuple[str, ...], out: str | None, layers: tuple[str, ...], labels: tuple[str, ...], title: str
) -> None:
    """Write one HTML page about stored results; nothing is computed again.

    It works from a disk, without a network: findings in sentences, the histogram, metrics over layer × role,
    similarities, every matrix in a table that sorts and filters, coverage and warnings. Several DIRs stand side
    by side.
    """
    from spectra.errors import SelectionError
    from spectra.plots.stored import run_labels
    from spectra.report import write_report
    from spectra.results.homes import home_of, nothing_stored

    if out is None:
        # What is no folder at all is the first thing to mend.
        for directory in directories:
            if not home_of(directory).exists():
                raise nothing_stored(directory)
        raise click.UsageError("--out is missing: the page to write, such as --out page.html")
    try:
        run_labels(directories, labels)
    except SelectionError as problem:
        raise click.UsageError(str(problem)) from None
    write_report(directories, out, labels=labels, layers=layers, title=title)
    click.echo(out)
