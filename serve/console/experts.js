// The view of the experts: figures of the whole, the slots, and a table.

import { tile } from "./charts.js";
import { el, fill, heading, keyed, set, text } from "./dom.js";
import { makeRow, updateRow } from "./expert_row.js";
import { PAST_MS, course, rate, server } from "./watch.js";
import { count, digits } from "./words.js";

const WHERE = [["", "everywhere"], ["slot", "in a slot"], ["host", "in host memory"], ["disk", "on disk"], ["refused", "refused"]];
const RANK = { slot: 0, host: 1, disk: 2 };

// Columns: title, and what to sort by where that is of use; numbers are largest first.
const COLUMNS = [
  ["Expert", (expert) => expert.id],
  ["Where", (expert) => (expert.error ? 3 : RANK[expert.tier])],
  ["Size", (expert) => -expert.bytes],
  ["Bits a weight", (expert) => expert.bits_per_weight],
  ["Requests/s", (expert) => -rate("requests", expert.id)],
  ["Tokens/s", (expert) => -rate("tokens", expert.id)],
  ["Open", (expert) => -(expert.running + expert.waiting)],
  ["Last asked", (expert) => -(expert.last_used ?? 0)],
  ["Where it was", null],
  ["By hand", null],
];

const tiles = {
  requests: tile("Requests a second"),
  tokens: tile("Tokens a second"),
  open: tile("Open requests"),
  swaps: tile("Swaps a minute"),
};
const slots = el("ol", { class: "slots", "aria-label": "Slots" });
const find = el("input", { type: "search", placeholder: "Find an expert", "aria-label": "Find an expert", oninput: draw });
const where = el("select", { "aria-label": "Where they are", onchange: draw }, ...WHERE.map(([value, words]) => el("option", { value }, words)));
const found = el("span", { class: "hint", role: "status" });
const body = el("tbody", { role: "rowgroup" });
const empty = el("p", { class: "empty", hidden: true });
const heads = COLUMNS.map(head);
const sorting = { column: null, down: false };

export function mount(root) {
  const row = el("tr", { role: "row" }, ...heads);
  const table = el("table", { class: "experts", role: "table", "aria-label": "Experts" }, el("thead", { role: "rowgroup" }, row), body);
  root.append(
    heading("Experts", "Who can answer, and where each one is now. From a slot an expert answers at once, from host memory after one copy, from disk after it is read and checked."),
    el("div", { class: "tiles" }, ...Object.values(tiles).map((each) => each.node)),
    el("h2", {}, "Slots"),
    slots,
    el("div", { class: "bar-of-tools" }, el("h2", {}, "All experts"), find, where, found),
    el("div", { class: "card" }, table, empty),
    el("p", { class: "legend" }, ...WHERE.slice(1).map(([kind, words]) => el("span", { class: `key ${kind}` }, words)), "noted while this page is open"),
  );
}

export function update() {
  updateTiles();
  updateSlots();
  draw();
}

function updateTiles() {
  const { history, samplesError } = server;
  const last = history.at(-1);
  const none = samplesError ? "/metrics cannot be read" : "";
  const per = (counter, factor) => course(counter).map(([at, value]) => [at, value * factor]);
  tiles.requests.show(digits(rate("requests")), none || "over ten seconds", per("requests", 1), PAST_MS);
  tiles.tokens.show(digits(rate("tokens")), none || "generated", per("tokens", 1), PAST_MS);
  tiles.swaps.show(digits(rate("swaps") * 60), none || "moves into a slot", per("swaps", 60), PAST_MS);
  const open = history.map((seen) => [seen.at, seen.running + seen.waiting]);
  const states = last ? `${last.running} running, ${last.waiting} waiting` : none;
  tiles.open.show(last ? String(last.running + last.waiting) : "–", states, open, PAST_MS);
}

function updateSlots() {
  const places = new Map(server.experts.filter((each) => each.slot !== null).map((each) => [each.slot, each]));
  const numbers = Array.from({ length: Math.max(server.slots, ...[...places.keys()].map((key) => key + 1)) }, (_, index) => index);
  keyed(slots, numbers, String, makeSlot, (item, number) => {
    const expert = places.get(number);
    set(item, "class", expert ? "slot" : "slot free");
    text(item.children[1], expert?.id ?? "free");
    set(item.children[1], "title", expert?.id);
    text(item.children[2], expert ? [expert.pinned ? "pinned" : "", busy(expert)].filter(Boolean).join(", ") : "");
  });
}

function makeSlot(number) {
  return el("li", {}, el("span", { class: "label" }, `Slot ${number}`), el("strong", {}), el("span", { class: "detail" }));
}

function busy(expert) {
  return expert.running + expert.waiting ? count(expert.running + expert.waiting, "request", "requests") : "idle";
}

function head([title, by], index) {
  const sorts = by === null ? title : el("button", { type: "button", class: "sort", onclick: () => sortBy(index) }, title);
  return el("th", { scope: "col", role: "columnheader" }, sorts);
}

function lastMinutes() {
  const minutes = server.residency.reach(server.at) / 60_000;
  return minutes === 1 ? "Last minute" : `Last ${minutes} minutes`;
}

function sortBy(index) {
  sorting.down = sorting.column === index && !sorting.down;
  sorting.column = index;
  draw();
}

function chosen() {
  const letters = find.value.trim().toLowerCase();
  const shown = server.experts.filter((expert) => {
    const tier = expert.error ? "refused" : expert.tier;
    return expert.id.toLowerCase().includes(letters) && (where.value === "" || where.value === tier);
  });
  if (sorting.column === null) return shown;
  const by = COLUMNS[sorting.column][1];
  const keys = new Map(shown.map((expert) => [expert, by(expert)]));
  const sign = sorting.down ? -1 : 1;
  return shown.sort((a, b) => sign * (keys.get(a) < keys.get(b) ? -1 : keys.get(a) > keys.get(b) ? 1 : 0));
}

function draw() {
  const shown = chosen();
  heads.forEach((cell, index) => {
    if (COLUMNS[index][0] === "Where it was") text(cell, lastMinutes());
    const direction = sorting.down ? "descending" : "ascending";
    set(cell, "aria-sort", index === sorting.column ? direction : null);
  });
  keyed(body, shown, (expert) => expert.id, makeRow, updateRow);
  const all = server.experts.length;
  text(found, shown.length === all ? count(all, "expert", "experts") : `${shown.length} of ${count(all, "expert", "experts")}`);
  set(empty, "hidden", shown.length > 0);
  if (server.at === 0) text(empty, "The server has not answered yet.");
  else if (all === 0) fill(empty, "No expert is on offer. Compress one with ", el("code", {}, "deltamux compress BASE TUNED -o DIR"), " and load it with ", el("code", {}, "POST /v1/experts"), ".");
  else text(empty, "No expert is called like that, there.");
}
