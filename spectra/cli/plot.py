"""`spectra plot`: redraw from stored results, several runs in one figure."""

from __future__ import annotations

import click

from spectra.cli import report
from spectra.cli.drawing import USUAL
from spectra.cli.options import layer_option, size_option
from spectra.cli.talk import say

# As in spectra.plots, which is not imported to print a help; a test holds them together.
BINS = 100
CLOSE_UP = 0.05
FORMATS = ("png", "pdf", "svg")
KINDS = ("histogram", "depth", "scree", "kept")


@click.command("plot", short_help="Redraw figures from stored results.")
@click.argument("directories", nargs=-1, required=True, metavar="DIR…", type=click.Path())
@layer_option
@click.option("--label", "labels", multiple=True, help="Name of a DIR in the figure, in order.  [default: its folder]")
@click.option("--title", default="", metavar="TEXT", help="A title above each figure, beside what its numbers say.")
@click.option(
    "--out", type=click.Path(file_okay=False), metavar="DIR", help="Where to put figures.  [default: first DIR]"
)
@click.option("--bins", type=click.IntRange(min=2), default=BINS, show_default=True, help="Bins of the histogram.")
@click.option("--close-up", type=click.FloatRange(min=0, max=1, min_open=True), default=CLOSE_UP, show_default=True,
              metavar="SHARE", help="Share of min(out, in) values per matrix in the close-up.")  # fmt: skip
@click.option("--side", type=click.Choice(["left", "right", "both"]), default="both", show_default=True,
              help="Which stored similarities.")  # fmt: skip
@click.option(
    "--per-layer", is_flag=True, help="One curve per layer of each role; more than a figure holds are pages of it."
)
@click.option(
    "--kind",
    "kinds",
    type=click.Choice(KINDS),
    multiple=True,
    help="Which figures of spectra: the histogram, metrics over depth, scree (σ over its index, with a line at 90 % of "
    "the energy) or kept (kept energy over parameters); repeatable.  [default: histogram, depth]",
)
@click.option(
    "--format",
    "formats",
    type=click.Choice(FORMATS),
    multiple=True,
    help="What to write; repeatable.  [default: png, pdf]",
)
@size_option
def command(
    directories: tuple[str, ...],
    layers: tuple[str, ...],
    labels: tuple[str, ...],
    title: str,
    out: str | None,
    bins: int,
    close_up: float,
    side: str,
    per_layer: bool,
    kinds: tuple[str, ...],
    formats: tuple[str, ...],
    size: str,
) -> None:
    """Redraw the figures of stored results; nothing is computed again.

    \b
    Of each DIR it draws what that command left there with --out:
      svd             histogram, depth (size and stable rank over layers
                      and roles); with --kind also scree and kept
      similarity      φ as heatmaps; of three and more, every two as a square
      alignment       cosines and deciles against W₀, or counts of intruders
      interference    cosines of every two, and numbers over the layers
      heads           how alike heads are, over the layers
      series          metrics along training
      verify          the verdict of every matrix

    One DIR of svd: a curve per role. Several: a curve each, on shared bins.
    The numbers behind each figure go into a csv file beside it.
    """
    from spectra.errors import SelectionError
    from spectra.plots import draw_results
    from spectra.plots.figures import DEFAULT_FORMATS
    from spectra.plots.stored import run_labels

    try:
        run_labels(directories, labels)
    except SelectionError as problem:
        raise click.UsageError(str(problem)) from None
    drawn = draw_results(
        directories,
        out,
        layers=layers,
        labels=labels,
        sides=("left", "right") if side == "both" else (side,),
        title=title,
        bins=bins,
        close_up=close_up,
        per_layer=per_layer,
        kinds=kinds or USUAL,
        formats=formats or DEFAULT_FORMATS,
        size=size,
    )
    for line in drawn.notes:
        report.note(line)
    for path in drawn.files:
        say(path)
