"use strict";
// Commands are broken where the screen ends, but between words alone and not behind the hyphens of an option.
document.addEventListener("DOMContentLoaded", () => {
  for (const command of document.querySelectorAll(".highlight-console pre")) {
    const texts = [], walk = document.createTreeWalker(command, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) texts.push(walk.currentNode);
    for (const text of texts.filter((node) => node.data.includes("-"))) {
      text.replaceWith(...text.data.split(/(\s+)/).filter(Boolean).map((part) => {
        if (!part.trim()) return part;
        const word = document.createElement("span");
        word.className = "word";
        word.textContent = part;
        return word;
      }));
    }
  }
});
