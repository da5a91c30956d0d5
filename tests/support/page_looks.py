"""What an eye, a hand and an ear would find on a page, as scripts that run in it."""

from __future__ import annotations

# The lines in which the parts that a selector means are shown, as their texts.
LINES = """selector => [...document.querySelectorAll(selector)].map(part => {
  const range = document.createRange(), lines = [];
  const walk = document.createTreeWalker(part, NodeFilter.SHOW_TEXT);
  let top = null;
  for (let text = walk.nextNode(); text; text = walk.nextNode()) {
    for (let i = 0; i < text.length; i++) {
      range.setStart(text, i);
      range.setEnd(text, i + 1);
      const at = range.getClientRects()[0];
      if (!at) continue;
      if (top === null || at.top > top + 4) lines.push("");
      lines[lines.length - 1] += text.data[i];
      top = at.top;
    }
  }
  return lines;
})"""

# What the clipboard gets of the first part that a selector means.
COPIED = """selector => {
  getSelection().selectAllChildren(document.querySelector(selector));
  return getSelection().toString();
}"""

# The parts whose words have less contrast with what lies behind them than 4.5, by the formula of WCAG 2.2.
CONTRASTS = r"""() => {
  const parts = colour => colour.match(/[\d.]+/g).map(Number);
  const linear = c => c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = part => {
    for (; part; part = part.parentElement) {
      const colour = parts(getComputedStyle(part).backgroundColor);
      if (colour[3] !== 0) return colour;
    }
    return [255, 255, 255];
  };
  const weak = [];
  for (const part of document.querySelectorAll("body *")) {
    const words = [...part.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!(words || part.placeholder) || !part.getClientRects().length) continue;
    const style = getComputedStyle(part, part.placeholder ? "::placeholder" : null);
    const colours = [parts(part instanceof SVGElement ? style.fill : style.color), behind(part)].map(light);
    const ratio = (Math.max(...colours) + 0.05) / (Math.min(...colours) + 0.05);
    if (ratio < 4.5) weak.push(`${ratio.toFixed(2)}: ${part.outerHTML.slice(0, 90)}`);
  }
  return weak;
}"""
