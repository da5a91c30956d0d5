"""The page in a real browser: it runs without an error, sorts, filters, opens, shows values; no name does anything."""

from __future__ import annotations

import csv
import json
import shutil
from itertools import pairwise

import pytest
from support.hostile_names import HOSTILE
from support.page_looks import CONTRASTS, COPIED, LINES
from support.report_numbers import ordered

import spectra
from spectra import text
from spectra.spectrum import Spectrum

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (apt install chromium)")


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright, which drives the browser, is not installed")
    with api.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def show(browser, tmp_path):
    """Writes a page, opens it without a network, and holds it to not complaining."""
    complaints, opened = [], []

    def open_page(directories, *, width=1280, scheme="light", **options):
        path = tmp_path / "shown.html"
        spectra.write_report(directories, path, **options)
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        page = context.new_page()
        opened.append(context)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda problem: complaints.append(str(problem)))
        page.on("request", lambda request: None if request.url.startswith("file:") else complaints.append(request.url))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in opened:
        context.close()
    assert complaints == []


def column(page, key):
    """The shown texts of a column of the table of matrices."""
    heads = page.locator("#matrices thead th").all_inner_texts()
    texts = "place => [...document.querySelectorAll('#matrices tbody tr')].map(row => row.children[place].innerText)"
    return page.evaluate(texts, [head.split()[0] for head in heads].index(key))


def table(path):
    return list(csv.DictReader(path.open(encoding="utf-8")))


def test_every_shown_cell_is_the_csvs(runs, show):
    page = show(runs / "first")
    page.get_by_role("button", name="All columns").click()
    rows = table(runs / "first/summary.csv")
    for key in rows[0]:
        numeric = key not in ("name", "role", "status", "method", "reason", "note", "rounding")
        wanted = [text.figure(float(row[key])) if numeric and row[key] else row[key] or "–" for row in rows]
        assert column(page, key) == wanted, key


@pytest.mark.parametrize("key", ["norm", "layer", "name", "rank_90"])
def test_the_table_sorts_both_ways_with_what_is_missing_last(runs, show, key):
    page = show(runs / "first")
    names = [row["name"] for row in table(runs / "first/summary.csv")]
    assert column(page, "name") == names
    head = page.locator(f"#matrices thead button:text-is('{key}')")
    for direction in ("descending", "ascending") if key != "name" else ("ascending", "descending"):
        head.click()
        wanted = ordered(table(runs / "first/summary.csv"), key, direction == "descending")
        assert column(page, "name") == [row["name"] for row in wanted]
        assert page.locator(f"#matrices th[aria-sort={direction}]").inner_text().split()[0] == key
        assert page.evaluate("document.activeElement.textContent") == key, "the focus stays on the heading"


def test_the_table_filters_by_words_role_and_run(runs, show):
    page = show([runs / "first", runs / "second"])
    page.get_by_label("Filter the rows").fill("LAYERS.1 v_proj")
    page.get_by_text("2 of 15 rows").wait_for()
    assert set(column(page, "name")) == {"model.layers.1.self_attn.v_proj.weight"}
    page.get_by_label("Filter the rows").fill("")
    page.get_by_label("Only this run").select_option(label="second")
    page.get_by_label("Only this role").select_option(label="q_proj")
    page.get_by_text("3 of 15 rows").wait_for()
    assert set(column(page, "run")) == {"second"}
    page.get_by_label("Filter the rows").fill("nothing like it")
    page.get_by_text("0 of 15 rows").wait_for()


def test_a_matrix_opens_with_its_spectrum_and_all_its_numbers(runs, show):
    page = show(runs / "first")
    row = table(runs / "first/summary.csv")[1]
    button = page.get_by_role("button", name=row["name"])
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-expanded") == "true"
    facts = page.locator(".detail dl div").all_text_contents()
    assert f"gini_all{text.figure(float(row['gini_all']))}" in facts
    assert f"method{row['method']}" in facts
    assert page.locator(".scree .hit").count() > 5
    page.locator(".scree .hit").first.hover()
    assert page.locator("#tip").inner_text().startswith(f"σ of index 1 = {text.figure(float(row['sigma_1']))}")
    page.keyboard.press("Enter")
    assert page.locator(".detail").count() == 0


def test_pointer_and_keys_show_the_values_of_the_pictures(runs, show):
    page = show([runs / "first", runs / "same"])
    tip = page.locator("#tip")
    cell = page.locator("#depth-relative_norm tbody td").nth(1)
    cell.hover()
    layer_1 = next(
        row for row in table(runs / "first/summary.csv") if row["name"] == "model.layers.1.self_attn.q_proj.weight"
    )
    said = f"q_proj, layer 1: {text.figure(float(layer_1['relative_norm']))}"
    assert tip.inner_text() == said
    page.locator("h1").hover()
    assert tip.is_hidden()
    page.locator("#depth-relative_norm tbody td").first.focus()
    page.keyboard.press("ArrowRight")
    assert tip.inner_text() == said
    page.keyboard.press("ArrowDown")
    assert tip.inner_text().startswith("v_proj, layer 1: ")
    bar = page.locator(".ridge .bar").first
    bar.scroll_into_view_if_needed()
    box = bar.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] - 20)
    assert tip.inner_text() == bar.get_attribute("data-tip"), "anywhere in its interval, for it may be very low"
    page.locator(".phi svg.grid").first.focus()
    page.keyboard.press("ArrowLeft")
    assert tip.inner_text().startswith("φ(5, 4) = ")
    page.keyboard.press("Escape")


def test_one_metric_is_shown_at_a_time(runs, show):
    page = show(runs / "second")
    assert page.locator(".block:visible h3").all_inner_texts()[0].startswith("relative_norm")
    page.get_by_role("button", name="stable_rank").first.click()
    assert [said.split()[0] for said in page.locator(".block:visible h3").all_inner_texts()] == ["stable_rank"]
    page.emulate_media(media="print")
    assert page.locator(".block:visible").count() > 3, "printed, all of them are there"


def test_a_strangers_names_do_nothing(hostile, show):
    page = show(hostile, title=HOSTILE[0], labels=[HOSTILE[1]])
    page.get_by_role("button", name="All columns").click()
    assert set(column(page, "name")) == {*map(text.visible, HOSTILE), "bad.weight"}
    for button in page.locator(".open").all():
        button.click()
        button.hover()
    for choice in page.locator("[data-show]").all():
        choice.click()
        for cell in page.locator(".heat td:not(.none):visible").all():
            cell.hover()
    page.locator("#matrices thead button:text-is('note')").click()
    page.get_by_label("Only this role").select_option(index=1)
    assert page.evaluate("window.hit") is None
    assert page.evaluate("document.querySelectorAll('main img, main script, main b[onclick], main i').length") == 0
    assert page.evaluate("document.scripts.length") == 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 820, 1440])
def test_no_width_needs_sideways_scrolling_of_the_page(runs, show, width, scheme):
    deep = [Spectrum(f"h.{i}.attn.c_proj.weight", (2, 2), S=[1.0 + i, 0.5]) for i in range(48)]
    spectra.save(deep, runs / "deep")
    page = show([runs / "first", runs / "deep", runs / "same"], width=width, scheme=scheme)
    page.locator(".open").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")
    page.locator("#theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != background


def test_on_a_phone_the_values_of_an_opened_matrix_are_on_the_screen(runs, show):
    page = show([runs / "first"], width=360)
    page.locator(".open").first.click()
    right = page.evaluate(
        "Math.max(...[...document.querySelectorAll('.detail dd')].map(e => e.getBoundingClientRect().right))"
    )
    assert 0 < right <= 360


def test_paper_holds_the_tables_whole(runs, show):
    names = [f"encoder.layer.{i}.attention.self.query.with.a.name.that.is.long.weight" for i in range(2)]
    spectra.save([Spectrum(name, (1536, 384), S=[1.0, 0.5], base_norm=9.0) for name in names], runs / "long")
    page = show([runs / "long"], width=700)  # A4 less its margins, in the units of a page
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
    right = page.evaluate(
        "Math.max(...[...document.querySelectorAll('td, th')].map(e => e.getBoundingClientRect().right))"
    )
    assert 0 < right <= 700


def test_on_paper_names_stay_in_few_lines_and_nothing_is_wider_than_a_page(show, tmp_path):
    names = [f"model.layers.{i}.block_sparse_moe.experts.{i}.down_proj.weight" for i in range(40)]
    spectra.save([Spectrum(name, (24, 24), S=[1.0, 0.5]) for name in names], tmp_path / "deep")
    page = show(tmp_path / "deep", width=703)  # A4 between margins of 12 mm
    page.emulate_media(media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= 703
    heights = page.evaluate("[...document.querySelectorAll('.rows tbody th')].map(cell => cell.clientHeight)")
    assert len(heights) == 40
    assert max(heights) < 40, "three lines at most"


def test_paper_has_headings_on_every_sheet_and_nothing_to_press(runs, show):
    page = show(runs / "first", scheme="dark")
    page.locator("#theme").click()
    page.locator("#theme").click()
    page.get_by_role("button", name="All columns").first.click()
    page.get_by_label("Filter the rows").first.fill("q_proj")
    page.locator("#matrices").get_by_text("4 of 9 rows").wait_for()
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("#matrices").get_by_text("4 of 9 rows").is_visible(), "a filtered table says so"
    assert page.locator("#matrices thead th:visible").all_inner_texts()[:3] == ["name", "role", "layer"]
    assert page.locator("#matrices thead th:visible").count() == 12, "as many as a sheet holds"
    assert page.locator("button:visible:not(.open), input:visible, select:visible, nav:visible").count() == 0
    assert page.evaluate("getComputedStyle(document.querySelector('.open'), '::before').content") == "none"
    assert page.evaluate("getComputedStyle(document.querySelector('.open')).color") == "rgb(0, 0, 0)"
    for part in ("thead", "tr", "figure", ".ridges", "p", "li"):
        assert page.evaluate(f"getComputedStyle(document.querySelector('main {part}')).breakInside") == "avoid"


def test_a_name_breaks_behind_dots_and_underscores_and_is_copied_as_it_is(show, tmp_path):
    name = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0.weight"
    both = [Spectrum(name, (8, 8), S=[2.0, 0.5], base_norm=1.0), Spectrum("out", (8, 8), S=[1.0], base_norm=1.0)]
    spectra.save(both, tmp_path / "names")
    page = show(tmp_path / "names", width=390)
    page.get_by_role("button", name=name).click()
    lines = page.evaluate(LINES, ".open, #findings li, .detail dd")
    broken = [part for part in lines if len(part) > 1]
    assert sum("up_blocks" in "".join(part) for part in broken) >= 2
    for part in broken:
        for line, after in pairwise(part):
            assert line[-1] in "._/ ,;)" or after[0] in " (", (line, after)
    for place in ("[aria-expanded=true]", "#findings li:has(wbr)", ".detail dd"):
        assert name in page.evaluate(COPIED, place), place


def test_what_is_wider_than_the_screen_says_so_until_its_end(runs, show):
    names = [f"h.{i}.attn.c_proj.weight" for i in range(48)]
    spectra.save([Spectrum(name, (2, 2), S=[1.0, 0.5], base_norm=1.0) for name in names], runs / "deep")
    page = show(runs / "deep", width=390)
    box, hint = page.locator(".heat .scroll").first, page.locator(".heat .hint").first
    assert hint.inner_text().startswith("Wider than the screen")
    assert "after" in box.get_attribute("class").split()
    assert box.get_attribute("tabindex") == "0"
    box.evaluate("box => { box.scrollLeft = box.scrollWidth }")
    page.wait_for_function("!document.querySelector('.heat .scroll').classList.contains('after')")
    row, cell = page.locator(".heat tbody th").first.bounding_box(), box.bounding_box()
    assert row["x"] == pytest.approx(cell["x"], abs=1), "the role stays where it is"
    wide = show(runs / "second")
    assert wide.locator(".heat .hint:visible").count() == 0
    assert wide.locator(".heat .scroll").first.get_attribute("tabindex") is None, "no stop of the tab key for nothing"


@pytest.mark.parametrize("scheme", ["light", "dark", "paper"])
def test_every_word_has_the_contrast_of_aa(runs, show, scheme):
    page = show([runs / "first", runs / "same"], scheme="light" if scheme == "paper" else scheme)
    page.locator(".open").first.click()
    if scheme == "paper":
        page.emulate_media(media="print")
    weak = page.evaluate(CONTRASTS)
    assert weak == []


def test_every_control_and_picture_has_a_name_for_a_screen_reader(runs, show):
    page = show([runs / "first", runs / "same"])
    page.locator(".open").first.click()
    nameless = page.evaluate(
        """[...document.querySelectorAll('button, input, select, a, svg[role], [role=img], [role=group]')]
        .filter(e => !(e.getAttribute('aria-label') || e.textContent || '').trim()).map(e => e.outerHTML)"""
    )
    assert nameless == []
    assert page.evaluate("document.querySelectorAll('th:not([scope])').length") == 0
    levels = [int(tag[1]) for tag in page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(e => e.tagName)")]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_tables_of_other_commands_sort_open_and_show_values(runs, show, tmp_path):
    names = ("layers.0.v_proj.weight", "layers.1.v_proj.weight", HOSTILE[1])
    found = [{"name": names[i], "role": "v_proj", "layer": i, "status": "ok",
              "residual": value, "rounding": 0.1, "scale": 1.0, "verdict": "rounded", "cause": "", "note": ""}
             for i, value in enumerate((0.25, 0.75, 0.5))]  # fmt: skip
    square = [[1.0, 0.25], [0.25, 1.0]]
    together = [row | {"cosines": square, "mean_cosine": 0.25, "norm_ratio": 1.25} for row in found]
    for name, document in {"verify": {"verdict": "rounded", "matrices": found},
                           "interference": {"tuned": ["a", "b"], "matrices": together}}.items():  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.json").write_text(json.dumps(document))
    directories = [runs / "first", tmp_path / "verify", tmp_path / "interference"]
    narrow = show(directories, width=360, scheme="dark")
    assert narrow.evaluate("document.documentElement.scrollWidth") <= 360
    page = show(directories)
    head = page.locator("#section-0 thead button:text-is('residual')")
    head.click()
    shown = page.locator("#section-0 [data-table] tbody tr").all_inner_texts()
    assert [line.split("\t")[3] for line in shown] == ["0.75", "0.5", "0.25"]
    page.locator("#section-0 .open").first.click()
    assert page.locator("#section-0 .detail dl div").count() == 10
    page.locator("#section-1 .square td").nth(2).hover()
    assert page.locator("#tip").inner_text() == "b, update a: 0.25"
    assert page.evaluate("window.hit") is None
    assert page.evaluate("document.documentElement.scrollWidth") <= 1440
