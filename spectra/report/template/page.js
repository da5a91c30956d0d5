"use strict";
// Everything that comes from a file is put into the page as text (textContent, createTextNode), never as markup.
const numbers = JSON.parse(document.getElementById("numbers").textContent);
const SVG = "http://www.w3.org/2000/svg";

function element(tag, options = {}, children = []) {
  const made = options.svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(options)) if (key !== "svg") made.setAttribute(key, value);
  made.append(...[].concat(children));
  return made;
}

// As the other numbers of the page: whole ones in full, others to four digits, as Python's .4g writes them.
function figure(value) {
  if (value === null || value === undefined || value === "") return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value) && Math.abs(value) < 1e9) return value.toLocaleString("en-US");
  const [mantissa, exponent] = value.toExponential(3).split("e");
  const power = Number(exponent);
  const trimmed = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
  if (power >= -4 && power < 4) return trimmed(value.toPrecision(4));
  return `${trimmed(mantissa)}e${power < 0 ? "-" : "+"}${String(Math.abs(power)).padStart(2, "0")}`;
}

// Text that a narrow column may break behind a dot, an underscore or a slash: what is copied of it is the text itself.
function breakable(words) {
  const pieces = String(words).match(/[^._/]*[._/]*/g).filter(Boolean);
  return pieces.flatMap((piece, place) => (place ? [element("wbr"), piece] : [piece]));
}

/* A table that goes on to a side fades out there, says so, and is a stop of the tab key. */
const sizes = new ResizeObserver((entries) => entries.forEach((entry) => ends(entry.target.closest(".scroll"))));
function ends(box) {
  const room = box.scrollWidth - box.clientWidth;
  box.classList.toggle("before", box.scrollLeft > 1);
  box.classList.toggle("after", box.scrollLeft < room - 1);
  box.previousElementSibling.hidden = room <= 1;
  if (room > 1 || box.scrollHeight > box.clientHeight + 1) box.setAttribute("tabindex", "0");
  else box.removeAttribute("tabindex");
}
function watchEnds(box) {
  box.before(element("p", { class: "hint", "aria-hidden": "true", hidden: "" }, "Wider than the screen: scroll sideways →"));
  box.addEventListener("scroll", () => ends(box), { passive: true });
  for (const part of [box, ...box.children]) sizes.observe(part);
}
document.querySelectorAll(".scroll").forEach(watchEnds);

/* The tip: what the pointer is over, or what has the keyboard's focus. */
const tip = document.getElementById("tip");
function showTip(text, box) {
  if (!text) { tip.hidden = true; return; }
  tip.textContent = text;
  tip.hidden = false;
  const own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(box.left + box.width / 2 - own.width / 2, 4), innerWidth - own.width - 4);
  const above = box.top - own.height - 6;
  tip.style.left = `${Math.max(left, 4)}px`;
  tip.style.top = `${above > 2 ? above : box.bottom + 6}px`;
}
function tipOf(target) {
  const marked = target.closest?.("[data-tip]");
  if (marked) return [marked.dataset.tip, marked.getBoundingClientRect()];
  const cell = target.closest?.(".heat td");
  return cell && cell.className !== "none" ? [cellTip(cell), cell.getBoundingClientRect()] : ["", null];
}
function cellTip(cell) {
  const row = cell.parentElement, table = cell.closest("table");
  const role = row.querySelector("th").textContent;
  let layer = table.querySelector("thead tr:last-child").children[cell.cellIndex].textContent;
  const stacks = table.querySelectorAll("th[scope=colgroup]");
  for (let i = 0, end = 0; i < stacks.length; i++) {
    end += stacks[i].colSpan;
    if (cell.cellIndex <= end) { layer = `${stacks[i].textContent} ${layer}`; break; }
  }
  const corner = table.querySelector(".corner").textContent;
  return `${role}, ${corner} ${layer}: ${cell.textContent === "–" ? "no number" : cell.textContent}`;
}
document.addEventListener("pointerover", (event) => showTip(...tipOf(event.target)));
document.addEventListener("focusin", (event) => showTip(...tipOf(event.target)));
document.addEventListener("focusout", () => showTip(""));
document.addEventListener("scroll", () => showTip(""), { passive: true });

/* Keys: one stop of the tab key per picture, arrows inside it. */
function navigable(container, items, columns) {
  if (!items.length) return;
  items.forEach((item, place) => item.setAttribute("tabindex", place ? "-1" : "0"));
  container.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
    const place = items.indexOf(document.activeElement);
    let next = event.key === "Home" ? 0 : event.key === "End" ? items.length - 1 : place + steps[event.key];
    if (event.key === "Escape") showTip("");
    if (place < 0 || !items[next]) return;
    event.preventDefault();
    items[place].setAttribute("tabindex", "-1");
    items[next].setAttribute("tabindex", "0");
    items[next].focus();
  });
}
for (const row of document.querySelectorAll("[data-nav=row]")) {
  const bars = [...row.querySelectorAll(".bar")];
  navigable(row, bars, 1);
  // A bar of one value among thousands is lower than a pixel: the pointer finds it anywhere in its interval.
  row.addEventListener("pointermove", (event) => {
    const boxes = bars.map((bar) => bar.getBoundingClientRect());
    const place = boxes.findIndex((box) => box.left <= event.clientX && event.clientX < box.right);
    bars.forEach((bar, i) => bar.classList.toggle("pointed", i === place));
    showTip(bars[place]?.dataset.tip, boxes[place]);
  });
  row.addEventListener("pointerleave", () => bars.forEach((bar) => bar.classList.remove("pointed")));
}
for (const table of document.querySelectorAll("[data-nav=grid]"))
  navigable(table, [...table.querySelectorAll("tbody td")], table.querySelector("tbody tr")?.querySelectorAll("td").length || 1);

/* One metric at a time. */
const choices = [...document.querySelectorAll("[data-show]")];
function choose(wanted) {
  for (const button of choices) {
    button.setAttribute("aria-pressed", String(button === wanted));
    document.getElementById(button.dataset.show).hidden = button !== wanted;
  }
}
if (choices.length) {
  choices[0].parentElement.hidden = false;
  choices.forEach((button) => button.addEventListener("click", () => choose(button)));
  choose(choices[0]);
}

/* Light and dark. */
const theme = document.getElementById("theme");
const isDark = () => (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const nameTheme = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
theme.hidden = false;
nameTheme();
theme.addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; nameTheme(); });

/* Similarity: the cell under the pointer, or under the arrows' cursor. */
for (const picture of document.querySelectorAll("svg[data-grid]")) {
  const { grid } = numbers.grids[Number(picture.dataset.grid)];
  const cursor = picture.querySelector(".cursor"), k = grid.length;
  let i = k - 1, j = k - 1;
  const show = () => {
    cursor.setAttribute("x", j);
    cursor.setAttribute("y", i);
    cursor.setAttribute("visibility", "visible");
    showTip(`φ(${i + 1}, ${j + 1}) = ${figure(grid[i][j])}`, cursor.getBoundingClientRect());
  };
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const place = (at, start, size) => Math.min(Math.max(Math.floor(((at - start) / size) * k), 0), k - 1);
    i = place(event.clientY, box.top, box.height);
    j = place(event.clientX, box.left, box.width);
    show();
  });
  const leave = () => { cursor.setAttribute("visibility", "hidden"); showTip(""); };
  picture.addEventListener("pointerleave", leave);
  picture.addEventListener("focus", show);
  picture.addEventListener("blur", leave);
  picture.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!step) return;
    event.preventDefault();
    i = Math.min(Math.max(i + step[0], 0), k - 1);
    j = Math.min(Math.max(j + step[1], 0), k - 1);
    show();
  });
}

/* A spectrum: σ over its index, both logarithmic, and the share of the energy up to there. */
function scree(curve) {
  const points = curve.points;
  if (!points.length) return element("p", { class: "small" }, "No nonzero singular value is stored.");
  const [width, height, left, right, top, bottom] = [420, 210, 46, 34, 10, 34];
  const log = Math.log10, last = points[points.length - 1][0];
  const edge = curve.edge && curve.edge < points[0][1] ? curve.edge : null;
  const low = Math.floor(log(Math.min(points[points.length - 1][1], edge || Infinity))), high = Math.ceil(log(points[0][1]) + 1e-9);
  const x = (index) => left + ((width - left - right) * log(index)) / (log(last) || 1);
  const y = (sigma) => top + ((height - top - bottom) * (high - log(sigma))) / (high - low || 1);
  const share = (value) => top + (height - top - bottom) * (1 - value);
  const path = (of) => points.map((point, place) => `${place ? "L" : "M"}${of(point)}`).join("");
  const at = (point, value) => `${x(point[0]).toFixed(1)} ${value.toFixed(1)}`;
  const said = `${last} singular values, from ${figure(points[0][1])} to ${figure(points[points.length - 1][1])}` + (curve.whole ? "" : "; the top of the spectrum only");
  const svg = element("svg", { svg: 1, class: "scree", viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": said });
  const line = (x1, y1, x2, y2, kind) => svg.append(element("line", { svg: 1, class: kind, x1, y1, x2, y2 }));
  const text = (at, to, words, anchor) => svg.append(element("text", { svg: 1, x: at, y: to, "text-anchor": anchor }, words));
  const step = Math.ceil((high - low) / 5) || 1;
  for (let power = low; power <= high; power += step) { line(left, y(10 ** power), width - right, y(10 ** power), "frame"); text(left - 5, y(10 ** power) + 3, `1e${power}`, "end"); }
  for (let power = 0; 10 ** power <= last; power++) text(x(10 ** power), height - bottom + 13, figure(10 ** power), "middle");
  for (const part of [0, 0.5, 1]) text(width - right + 4, share(part) + 3, `${100 * part} %`, "start");
  text((left + width - right) / 2, height - 5, "index i (logarithmic)", "middle");
  if (edge) line(left, y(edge), width - right, y(edge), "edge");
  svg.append(element("path", { svg: 1, class: "energy", d: path((point) => at(point, share(point[2]))) }));
  svg.append(element("path", { svg: 1, class: "sigma", d: path((point) => at(point, y(point[1]))) }));
  const hits = points.map((point) => element("circle", {
    svg: 1, class: "hit", cx: x(point[0]).toFixed(1), cy: y(point[1]).toFixed(1), r: 7, role: "img",
    "data-tip": `σ of index ${figure(point[0])} = ${figure(point[1])}; the first ${figure(point[0])} hold ${figure(100 * point[2])} % of Σσ²`,
  }));
  for (const hit of hits) {
    svg.append(element("circle", { svg: 1, class: "dot", cx: hit.getAttribute("cx"), cy: hit.getAttribute("cy"), r: 2 }));
    hit.setAttribute("aria-label", hit.dataset.tip);
  }
  svg.append(...hits);
  navigable(svg, hits, 1);
  const words = `σ (line, left) and the share of Σσ² up to i (dashed, right)${edge ? "; red: storage-rounding edge" : ""}${curve.whole ? "" : "; top of the spectrum only"}`;
  return element("figure", {}, [svg, element("figcaption", {}, words)]);
}

/* Tables that sort, filter and open. */
function tableOf(table) {
  const place = document.querySelector(`[data-table=${table.id}]`);
  const columns = table.columns, where = Object.fromEntries(columns.map((column, i) => [column.key, i]));
  const roleAt = where.role, runAt = where.run;
  let all = false, sortBy = null, descending = true;
  const search = element("input", { type: "search", placeholder: "Filter by name, role, status, note …", "aria-label": "Filter the rows" });
  const selects = [["role", roleAt], ["run", runAt]].filter(([, at]) => at !== undefined).map(([key, at]) => {
    const values = [...new Set(table.rows.map((row) => row[at]))];
    const options = [element("option", { value: "" }, `every ${key}`), ...values.map((value, i) => element("option", { value: String(i) }, value))];
    return { at, values, select: element("select", { "aria-label": `Only this ${key}` }, options) };
  });
  const more = element("button", { type: "button", "aria-pressed": "false" }, "All columns");
  const count = element("span", { "aria-live": "polite" });
  const head = element("tr"), body = element("tbody");
  const grid = element("table", { class: "rows" }, [element("thead", {}, head), body]);
  const scroll = element("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Rows of the table" }, grid);
  place.append(element("div", { class: "tools" }, [search, ...selects.map((item) => item.select), more, count]), scroll);
  watchEnds(scroll);

  const missing = (value) => value === null || value === "";
  function ordered(rows) {
    if (sortBy === null) return rows;
    const sign = descending ? -1 : 1;
    return [...rows].sort((a, b) => {
      const [x, y] = [table.rows[a][sortBy], table.rows[b][sortBy]];
      if (missing(x) || missing(y)) return missing(x) - missing(y) || a - b;
      const by = columns[sortBy].text ? x.localeCompare(y, "en", { numeric: true }) : x - y;
      return sign * by || a - b;
    });
  }
  function matching() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    return table.rows.map((_, i) => i).filter((i) => {
      const row = table.rows[i];
      const text = columns.map((column, c) => (column.text ? row[c] : "")).join(" ").toLowerCase();
      return words.every((word) => text.includes(word)) && selects.every(({ at, values, select }) => select.value === "" || row[at] === values[Number(select.value)]);
    });
  }
  function headings() {
    head.replaceChildren(...columns.flatMap((column, c) => {
      if (!all && !column.shown) return [];
      const button = element("button", { type: "button" }, column.key);
      button.addEventListener("click", () => {
        descending = sortBy === c ? !descending : !column.text;
        sortBy = c;
        draw();
        head.querySelector(`[data-column="${c}"] button`).focus();
      });
      const sorted = sortBy === c ? (descending ? "descending" : "ascending") : "none";
      return [element("th", { scope: "col", "aria-sort": sorted, "data-column": c, class: kind(column) }, [button, onPaper(column.key)])];
    }));
  }
  // Where a table goes on on another sheet, its heading is printed again, but without what buttons hold.
  const onPaper = (key) => element("span", { class: "paper", "aria-hidden": "true" }, breakable(key));
  // What only "All columns" shows is too wide for paper.
  const kind = (column) => [column.text && "text", !column.shown && "extra"].filter(Boolean).join(" ");
  function rowOf(i) {
    const row = table.rows[i];
    const line = element("tr", { "data-row": i });
    columns.forEach((column, c) => {
      if (!all && !column.shown) return;
      if (column.key !== "name") {
        const long = typeof row[c] === "string" && row[c].length > 30 ? " long" : "";
        line.append(element("td", { class: kind(column) + long }, long ? breakable(row[c]) : figure(row[c])));
        return;
      }
      const open = element("button", { type: "button", class: "open", "aria-expanded": "false" }, breakable(row[c]));
      open.addEventListener("click", () => toggle(i, line, open));
      line.append(element("th", { scope: "row", class: "text" }, open));
    });
    return line;
  }
  function toggle(i, line, open) {
    const is = open.getAttribute("aria-expanded") === "true";
    open.setAttribute("aria-expanded", String(!is));
    if (is) { line.nextElementSibling.remove(); return; }
    const facts = columns.map((column, c) => {
      const value = figure(table.rows[i][c]);
      return element("div", { class: column.text ? "wide" : "" }, [element("dt", {}, column.key), element("dd", {}, column.text ? breakable(value) : value)]);
    });
    const detail = element("div", { class: "detail" }, [...(table.curves[i] ? [scree(table.curves[i])] : []), element("dl", {}, facts)]);
    line.after(element("tr", { class: "more" }, element("td", { colspan: line.children.length }, detail)));
  }
  function draw() {
    const rows = ordered(matching());
    headings();
    body.replaceChildren(...rows.map(rowOf));
    count.textContent = `${figure(rows.length)} of ${figure(table.rows.length)} rows`;
  }
  let waiting = 0;
  search.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(draw, 120); });
  selects.forEach(({ select }) => select.addEventListener("change", draw));
  more.addEventListener("click", () => { all = !all; more.setAttribute("aria-pressed", String(all)); draw(); });
  draw();
}
numbers.tables.forEach(tableOf);
