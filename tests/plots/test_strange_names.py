"""Every figure of names that strangers chose: shown as they are written, no mathematics, no control or bidi signs."""

from __future__ import annotations

import unicodedata
import warnings

import numpy as np
import pandas as pd
import pytest
from support.looked_at import drawn

import spectra
from spectra.merges.report import VERDICTS
from spectra.metrics.similarity import pool
from spectra.results.pairs import Pair, Pairs
from spectra.spectrum import Spectrum

STRANGE = {
    "a formula": "$\\frac{1}{2}$",
    "half a formula": "a_b^c$\\frac{",
    "a bidi override": "x\u202egnp\u2066\u200b",
    "a terminal's colours": "y\x1b[31m\x07\x00",
    "lines": "l\nine\u2028\r\t",
    "braces": "{0} %s {x!r} \\N",
    "an underscore in front": "_hidden_",  # matplotlib leaves labels out of legends that begin so
}
rng = np.random.default_rng(3)


def named(strange, layers=2):
    return [f"model.layers.{i}.{strange}.weight" for i in range(layers)]


def spectra_of(strange):
    U = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    return [Spectrum(name, (6, 6), S=[3.0, 2.0, 1.0], U=U[:, :3], Vh=U[:3], base_norm=9.0) for name in named(strange)]


def similarity(strange):
    one, other = spectra_of(strange)
    return spectra.subspace_similarity(one, other, top=3)


def rows(strange, **more):
    one = {"mean_cosine": 0.2, "norm_ratio": 1.2, "sti": 3.0, "mean_sar": 0.5, "sar_chance": 0.1, "shared": 0.4,
           "shared_null": 0.3, "cosines": [[1.0, 0.3], [0.3, 1.0]], "cosine": 0.1, "update_cosine": 0.2,
           "norm": 1.0}  # fmt: skip
    return [{"name": name, "role": strange, "layer": i, **one, **more} for i, name in enumerate(named(strange))]


def aligned(strange):
    done = {"status": "ok", "cosines": np.eye(4).tolist(), "intruders": 1, "out": 6, "in": 6,
            "left_deciles": [0.1] * 10, "right_deciles": [0.1] * 10}  # fmt: skip
    return pd.DataFrame({**done, "name": name, "role": strange} for name in named(strange))


def trained(strange):
    names = ("norm", "stable_rank", "top_1_share", "effective_rank", "phi_to_last", "phi_to_previous", "start_left",
             "start_right")  # fmt: skip
    return pd.DataFrame({"name": name, "role": strange, "step": step, "status": "ok", **dict.fromkeys(names, step)}
                        for step in (1, 2) for name in named(strange))  # fmt: skip


def pairs(strange):
    found = similarity(strange)
    return Pairs([Pair(strange, f"{strange} too", found), Pair(strange, f"{strange} again", found),
                  Pair(f"{strange} too", f"{strange} again", found)])  # fmt: skip


SQUARE = np.array([[1.0, 0.3], [0.3, 1.0]])
FIGURES = {
    "cosines_figure": lambda s: spectra.cosines_figure(rows(s), [s, f"{s} too"], title=s),
    "deciles_figure": lambda s: spectra.deciles_figure(aligned(s), title=s),
    "depth_figure": lambda s: spectra.depth_figure({s: spectra_of(s), "b": spectra_of(s)}, title=s),
    "heads_figure": lambda s: spectra.heads_figure(rows(s), title=s),
    "histogram_figure": lambda s: spectra.histogram_figure({s: spectra_of(s), "b": spectra_of(s)}, title=s),
    "kept_energy_figure": lambda s: spectra.kept_energy_figure({s: spectra_of(s), "b": spectra_of(s)}, title=s),
    "pairs_figure": lambda s: spectra.pairs_figure(pairs(s), title=s),
    "roles_over_depth_figure": lambda s: spectra.roles_over_depth_figure(rows(s), title=s),
    "scree_figure": lambda s: spectra.scree_figure({s: spectra_of(s), "b": spectra_of(s)}, title=s),
    "series_figure": lambda s: spectra.series_figure(trained(s), title=s),
    "similarity_figure": lambda s: spectra.similarity_figure({s: pool([similarity(s)], s)}, title=s, labels=(s, s)),
    "squares_figure": lambda s: spectra.squares_figure({s: SQUARE}, [s, f"{s} too"], label=s),
    "tops_figure": lambda s: spectra.tops_figure(aligned(s), title=s),
    "verdicts_figure": lambda s: spectra.verdicts_figure(rows(s, verdict=VERDICTS[0]), title=s),
    "plot_cosines": lambda s: spectra.plot_cosines(np.eye(4), title=s),
    "plot_deciles": lambda s: spectra.plot_deciles(aligned(s)),
    "plot_depth": lambda s: spectra.plot_depth(spectra_of(s), "norm", kind="lines"),
    "plot_histogram": lambda s: spectra.plot_histogram({s: spectra_of(s), "b": spectra_of(s)}),
    "plot_kept_energy": lambda s: spectra.plot_kept_energy(spectra_of(s), label=s),
    "plot_roles_over_depth": lambda s: spectra.plot_roles_over_depth(rows(s), column="norm_ratio", label=s, chance=1.0),
    "plot_scree": lambda s: spectra.plot_scree({s: spectra_of(s), "b": spectra_of(s)}),
    "plot_series": lambda s: spectra.plot_series(trained(s), metric="norm"),
    "plot_similarity": lambda s: spectra.plot_similarity(similarity(s), title=s, labels=(s, s)),
    "plot_square": lambda s: spectra.plot_square(SQUARE, labels=[s, f"{s} too"], label=s),
}


NAMELESS = {"plot_deciles", "plot_series"}  # whoever gives the axes makes the legend


def test_every_public_picture_is_among_them():
    public = {name for name in spectra.__all__ if name.endswith("_figure") or name.startswith("plot_")}
    assert set(FIGURES) == public


@pytest.mark.parametrize("strange", STRANGE)
@pytest.mark.parametrize("name", FIGURES)
def test_names_are_shown_as_they_are_written(name, strange):
    import matplotlib.pyplot as plt

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = FIGURES[name](STRANGE[strange])
        texts = [text.get_text() for text in drawn(getattr(made, "figure", made))]
    plt.close("all")
    shown = "".join(texts).replace("\n", " ")
    signs = {sign for sign in shown if unicodedata.category(sign) in ("Cc", "Cf", "Zl", "Zp")}
    assert not signs, f"{signs!r}"
    ours = [text for text in texts if "mathdefault" not in text]  # numbers of a logarithmic axis
    assert not any("$" in text.replace("\\$", "") for text in ours), ours
    found = {"a formula": "frac", "half a formula": "a_b", "a bidi override": "u202e", "a terminal's colours": "x1b",
             "lines": "ine", "braces": "%s", "an underscore in front": "_hidden_"}[strange]  # fmt: skip
    if name not in NAMELESS:
        assert found in shown.replace(" ", "")
