// What happened, in a sentence that goes away by itself; an error stays until it is closed.

import { el } from "./dom.js";

const SHOWN_MS = 6000;
const MOST = 4;

export function notice(words, isError = false) {
  const all = document.getElementById("notices");
  const close = el("button", { type: "button", class: "close", "aria-label": "Close", onclick: () => node.remove() }, "×");
  const node = el("div", { class: isError ? "notice error" : "notice", role: isError ? "alert" : null }, el("span", {}, words), close);
  all.append(node);
  while (all.children.length > MOST) all.firstElementChild.remove();
  if (!isError) setTimeout(() => node.remove(), SHOWN_MS);
}
