// One expert in the table, and what can be done with it by hand.

import { LONG_MS, ask } from "./api.js";
import { drawTimeline, timeline } from "./charts.js";
import { el, enable, isEnabled, set, text } from "./dom.js";
import { notice } from "./notices.js";
import { look, rate, server } from "./watch.js";
import { ago, bits, bytes, digits, latency } from "./words.js";

const WHERE = { slot: "slot", host: "host memory", disk: "disk", refused: "refused" };

function cell(label, className, ...children) {
  return el("td", { "data-label": label, class: className, role: "cell" }, ...children);
}

export function makeRow(expert) {
  const row = el("tr", { role: "row" });
  const reason = el("span", { class: "reason" });
  const path = el("span", { class: "path" });
  const name = el("th", { scope: "row", role: "rowheader", class: "who" }, el("strong", {}, expert.id), path, reason);
  const pill = el("span", { class: "pill" });
  const numbers = ["Size", "Bits a weight", "Requests/s", "Tokens/s", "Open", "Last asked"].map((label) => cell(label, "number"));
  const chart = timeline();
  const buttons = makeButtons(expert.id);
  row.append(name, cell("Where", "where", pill), ...numbers, cell("Where it was", "times", chart), cell("By hand", "hand", ...buttons));
  row.parts = { path, reason, pill, numbers, chart, buttons };
  return row;
}

export function updateRow(row, expert) {
  const { path, reason, pill, numbers, chart, buttons } = row.parts;
  const where = expert.error ? "refused" : expert.tier;
  const slot = expert.slot === null ? "" : ` ${expert.slot}`;
  text(path, expert.path ?? "");
  text(reason, expert.error ?? "");
  text(pill, `${WHERE[where]}${where === "slot" ? slot : ""}${expert.pinned ? ", pinned" : ""}`);
  set(pill, "class", `pill where-${where}`);
  const figures = [
    bytes(expert.bytes || NaN),
    bitsOf(expert),
    digits(rate("requests", expert.id)),
    digits(rate("tokens", expert.id)),
    expert.waiting ? `${expert.running} + ${expert.waiting} waiting` : String(expert.running),
    ago(expert.last_used, server.at),
  ];
  figures.forEach((words, index) => text(numbers[index], words));
  drawTimeline(chart, server.residency.of(expert.id), server.at, server.residency.reach(server.at));
  row.expert = expert;
  updateButtons(buttons, expert);
}

function bitsOf(expert) {
  if (expert.error || !expert.bits_per_weight) return "–";
  return `${bits(expert.bits_per_weight)} disk, ${bits(expert.slot_bits_per_weight)} slot`;
}

// Bring in, pin or let go; for an expert that was refused, try again.
function makeButtons(name) {
  const make = (act) => el("button", { type: "button", class: "small", onclick: (event) => act(event.currentTarget, name) });
  return [make(bringIn), make(pin), make(again)];
}

function updateButtons([bring, pinning, retry], expert) {
  const name = expert.id;
  const refused = Boolean(expert.error);
  set(bring, "hidden", refused);
  set(pinning, "hidden", refused);
  set(retry, "hidden", !refused);
  label(bring, "Bring in", `Bring in ${name}`);
  label(pinning, expert.pinned ? "Unpin" : "Pin", `${expert.pinned ? "Unpin" : "Pin"} ${name}`);
  label(retry, "Try again", `Try again to load ${name}`);
  enable(bring, expert.tier !== "slot" && !bring.dataset.busy);
  enable(pinning, !pinning.dataset.busy);
  enable(retry, !retry.dataset.busy);
}

function label(button, words, spoken) {
  text(button, words);
  set(button, "aria-label", spoken);
}

function expertOf(button) {
  return button.closest("tr").expert;
}

function bringIn(button, name) {
  return act(button, "POST", `v1/experts/${encodeURIComponent(name)}/slot`, undefined, (expert) => `${name} is in slot ${expert.slot}.`);
}

function pin(button, name) {
  const pinned = expertOf(button).pinned;
  const done = pinned ? `${name} may leave its slot when another needs it.` : `${name} keeps its slot.`;
  return act(button, pinned ? "DELETE" : "POST", `v1/experts/${encodeURIComponent(name)}/pin`, undefined, () => done);
}

function again(button, name) {
  const body = { name, path: expertOf(button).path };
  return act(button, "POST", "v1/experts", body, () => `${name} is loaded.`);
}

// Does one thing on the server and says how it went; a second press while it runs does nothing.
async function act(button, method, path, body, done) {
  if (!isEnabled(button)) return;
  button.dataset.busy = "true";
  enable(button, false);
  const start = Date.now();
  try {
    const expert = await ask(method, path, body, LONG_MS);
    notice(`${done(expert)} It took ${latency((Date.now() - start) / 1000)}.`);
  } catch (error) {
    notice(error.message, true);
  }
  delete button.dataset.busy;
  look();
  if (button.isConnected) enable(button, true);
}
