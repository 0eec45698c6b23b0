// The router in use: the mix of its last decisions against the one of its fit.

import { LONG_MS, ask } from "./api.js";
import { bar, drawBar } from "./charts.js";
import { el, enable, fill, heading, isEnabled, keyed, own, set, text } from "./dom.js";
import { notice } from "./notices.js";
import { server } from "./watch.js";
import { count, digits, percent } from "./words.js";

// Of prompts that the classifier had not seen at the fit.
const HELD_OUT = {
  accuracy: "Right domain, before abstaining",
  macro_f1: "Macro F1",
  ece: "Calibration error (ECE)",
  kept: "Experts' prompts that reach an expert",
  wrong: "Prompts that a wrong expert would answer",
  n: "Prompts held out",
};

const figures = { distance: figure("Distance of the mixes"), abstained: figure("Left to the base"), confidence: figure("Mean confidence"), decisions: figure("Decisions looked at") };
const mix = el("ul", { class: "mix" });
const empty = el("p", { class: "empty", hidden: true });
const missing = el("p", { class: "reason", hidden: true });
const facts = el("dl", { class: "facts" });
const reload = el("button", { type: "button", onclick: onReload }, "Load the router again");
const content = el("div", { class: "parts", hidden: true });
let asking = false;

function figure(name) {
  const value = el("strong", {}, "–");
  const detail = el("span", { class: "detail" });
  return { node: el("div", { class: "tile" }, el("span", { class: "label" }, name), value, detail), value, detail };
}

export function mount(root) {
  const legend = el("p", { class: "legend" }, el("span", { class: "key now" }, "now"), el("span", { class: "key fit" }, "at the fit"));
  content.append(
    el("div", { class: "tiles" }, ...Object.values(figures).map((each) => each.node)),
    missing,
    el("div", { class: "card" }, el("header", {}, el("h2", {}, "Mix of domains"), legend), mix),
    el("div", { class: "card" }, el("header", {}, el("h2", {}, "In use"), reload), facts),
  );
  root.append(heading("Router", "What requests to auto were about lately, against the prompts that the router was fitted on. When the two drift apart, collect prompts of the new kind and fit it again."), empty, content);
}

// Asked only while this view is shown.
export async function update() {
  if (asking || server.away || server.locked || server.at === 0) return;
  asking = true;
  try {
    show(await ask("GET", "v1/router"));
  } catch (error) {
    set(content, "hidden", true);
    set(empty, "hidden", false);
    if (error.status === 404) fill(empty, `There is no router: ${error.message}. Fit one with `, el("code", {}, "deltamux router fit"), " and name it in the configuration.");
    else text(empty, error.message);
  }
  asking = false;
}

function show(router) {
  const { drift, not_served: absent } = router;
  set(empty, "hidden", true);
  set(content, "hidden", false);
  const none = drift.decisions === 0;
  put(figures.decisions, String(drift.decisions), none ? "ask auto for one" : "1,000 at most");
  put(figures.distance, none ? "–" : digits(drift.mix_distance), "0 is alike, 1 is all different");
  put(figures.abstained, none ? "–" : percent(drift.abstained), `${percent(drift.fit_abstained)} at the fit`);
  put(figures.confidence, none ? "–" : percent(drift.confidence), `${percent(drift.fit_confidence)} at the fit`);
  set(missing, "hidden", absent.length === 0);
  text(missing, `The router may choose ${count(absent.length, "expert", "experts")} that cannot answer now: ${absent.join(", ")}.`);
  const domains = Object.entries(drift.fit_mix).sort((a, b) => b[1] - a[1]);
  keyed(mix, domains, ([name]) => name, makeDomain, (item, [name, fit]) => updateDomain(item, router, name, fit));
  showFacts(router);
}

function put({ value, detail }, words, details) {
  text(value, words);
  text(detail, details);
}

function makeDomain([name]) {
  const head = el("p", {}, el("strong", { class: "domain", title: name }, name), el("span", { class: "detail" }));
  const line = (kind, label) => el("p", { class: "pair" }, el("span", { class: "hidden-words" }, label), bar(kind), el("span", { class: "share" }));
  return el("li", {}, head, line("now", "now"), line("fit", "at the fit"));
}

function updateDomain(item, router, name, fit) {
  const [head, now, before] = item.children;
  const share = own(router.drift.mix, name) ?? NaN;
  const answers = own(router.experts, name) ?? "base";
  const threshold = own(router.thresholds, name);
  text(head.lastChild, `answered by ${answers}${threshold === undefined ? "" : ` from ${percent(threshold)} on`}`);
  drawBar(now.children[1], share || 0);
  text(now.children[2], percent(share));
  drawBar(before.children[1], fit);
  text(before.children[2], percent(fit));
}

function showFacts(router) {
  const known = [
    ["Directory", router.path],
    ["Shadow router", router.shadow ?? "none"],
    ["Features", router.features],
    ...Object.entries(HELD_OUT).map(([name, words]) => [words, name === "n" ? String(router.heldout.n) : percent(router.heldout[name])]),
  ];
  keyed(facts, known, ([name]) => name, ([name]) => el("div", {}, el("dt", {}, name), el("dd", {})), (item, [, value]) => text(item.lastChild, value));
}

async function onReload() {
  if (!isEnabled(reload)) return;
  enable(reload, false);
  try {
    show(await ask("POST", "v1/router/reload", undefined, LONG_MS));
    notice("The router was loaded again; its decisions are counted from now on.");
  } catch (error) {
    notice(error.message, true);
  }
  enable(reload, true);
}
