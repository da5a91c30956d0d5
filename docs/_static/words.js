"use strict";
// Commands are broken where the screen ends, but between words alone and not behind the hyphens of an option.
document.addEventListener("DOMContentLoaded", () => {
  for (const command of document.querySelectorAll(".highlight-console pre")) {
    const parts = [];
    let word = null;
    const add = (part) => {
      if (/\s/.test(part.textContent ?? part)) {
        parts.push(part);
        word = null;
        return;
      }
      if (!word) {
        word = document.createElement("span");
        word.className = "word";
        parts.push(word);
      }
      word.append(part);
    };
    for (const node of [...command.childNodes])
      if (node.nodeType === Node.TEXT_NODE) node.data.split(/(\s+)/).filter(Boolean).forEach(add);
      else if (node.textContent) add(node);
    command.replaceChildren(...parts);
  }
});
