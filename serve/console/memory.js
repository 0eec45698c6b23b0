// What takes the memory of the host and of the device.

import { drawSparkline, drawStack, sparkline } from "./charts.js";
import { el, heading, keyed, set, text } from "./dom.js";
import { sums } from "./metrics.js";
import { PAST_MS, server } from "./watch.js";
import { bytes, percent } from "./words.js";

// In the order of the bar, each with what it is.
const KINDS = {
  base: "weights of the base, once for all experts",
  slots: "experts on the device, ready to answer",
  kv_cache: "keys and values of running requests",
  workspace: "activations, captured graphs, the CUDA context",
  host_cache: "experts in host memory, one copy away from a slot",
  process: "the rest of the server's processes: interpreters, libraries, activations on a CPU",
};
const ON_DEVICE = ["base", "slots", "kv_cache", "workspace"];
const NAMES = { device: "Device", host: "Host" };

const places = el("div", { class: "places" });
const rows = el("tbody", {});
const empty = el("p", { class: "empty", hidden: true });
const table = el("table", { class: "kinds" }, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Kind"), el("th", { scope: "col" }, "What it is"), el("th", { scope: "col", class: "number" }, "Size"), el("th", { scope: "col", class: "number" }, "Share"))), rows);
const card = el("div", { class: "card" }, table);

export function mount(root) {
  root.append(heading("Memory", "Every byte that the server holds, by what it is for. The kinds add up to what the system reports as used."), empty, places, card);
}

export function update() {
  const { samples, samplesError } = server;
  const known = samples !== null && (samples.get("deltamux_memory_bytes") ?? []).length > 0;
  for (const part of [places, card]) set(part, "hidden", !known);
  set(empty, "hidden", known);
  if (!known) {
    text(empty, samplesError ? `/metrics cannot be read: ${samplesError.message}` : "The server has not told its memory yet.");
    return;
  }
  const sizes = sums(samples, "deltamux_memory_bytes", "kind");
  const used = sums(samples, "deltamux_memory_used_bytes", "place");
  const limits = sums(samples, "deltamux_memory_limit_bytes", "place");
  const kinds = [...sizes.keys()].sort((a, b) => order(a) - order(b));
  const placeOf = (kind) => (used.has("device") && ON_DEVICE.includes(kind) ? "device" : "host");
  const shown = [...used.keys()].sort().map((place) => ({
    place, used: used.get(place), limit: limits.get(place), kinds: kinds.filter((kind) => placeOf(kind) === place), sizes,
  }));
  keyed(places, shown, (each) => each.place, makePlace, updatePlace);
  keyed(rows, kinds, (kind) => kind, makeKind, (row, kind) => {
    text(row.children[2], bytes(sizes.get(kind)));
    text(row.children[3], percent(sizes.get(kind) / used.get(placeOf(kind))));
  });
}

function order(kind) {
  const place = Object.keys(KINDS).indexOf(kind);
  return place < 0 ? Infinity : place;
}

function makePlace({ place }) {
  const words = el("p", { class: "detail" });
  const stack = el("div", { class: "stack", "aria-hidden": "true" });
  const head = el("header", {}, el("h2", {}, NAMES[place] ?? place), words, sparkline());
  return el("div", { class: "card" }, head, stack);
}

// The bar is as long as the limit, so that what is free shows too.
function updatePlace(node, { place, used, limit, kinds, sizes }) {
  const [head, stack] = node.children;
  const whole = Math.max(limit || 0, used);
  text(head.children[1], limit ? `${bytes(used)} of ${bytes(limit)} in use, ${percent(used / limit)}` : `${bytes(used)} in use`);
  drawStack(stack, kinds.map((kind) => ({ name: kind, share: sizes.get(kind) / whole, title: `${kind}: ${bytes(sizes.get(kind))}` })));
  drawSparkline(head.children[2], server.history.map((seen) => [seen.at, seen.used.get(place)]), PAST_MS);
}

function makeKind(kind) {
  const swatch = el("span", { class: `swatch kind-${kind}`, "aria-hidden": "true" });
  return el("tr", {}, el("th", { scope: "row" }, swatch, kind.replaceAll("_", " ")), el("td", {}, KINDS[kind] ?? ""), el("td", { class: "number" }), el("td", { class: "number" }));
}
