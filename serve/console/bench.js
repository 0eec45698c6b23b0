// Prompts, and where the router sends each: probabilities, thresholds, the tokens that decided.

import { ask } from "./api.js";
import { bar, drawBar } from "./charts.js";
import { el, enable, field, heading, isEnabled, own, text } from "./dom.js";
import { latency, percent } from "./words.js";

const MOST_PROMPTS = 100;
const MOST_DOMAINS = 6;
const AT_ONCE = 4;
const REASONS = {
  router: "the router is sure",
  abstain: "the router is not sure, so the fallback answers",
  "router-error": "the router could not decide, so the fallback answers",
};
const EXAMPLES = "What is 17 times 23?\nSELECT every customer who ordered in May\nFind all files larger than 10 MB\nTell me a story about the sea";

const prompts = el("textarea", { rows: 5, spellcheck: false }, EXAMPLES);
const whole = el("input", { type: "checkbox" });
const run = el("button", { type: "submit", class: "primary" }, "Route");
const status = el("span", { class: "hint", role: "status" });
const results = el("ol", { class: "results", "aria-label": "Decisions" });

export function mount(root) {
  const form = el(
    "form",
    { class: "card ask", onsubmit: onSubmit },
    field("Prompts, one a line", prompts),
    el("label", { class: "check" }, whole, "The whole text is one prompt"),
    el("div", { class: "buttons" }, run, status),
  );
  root.append(heading("Routing bench", "Paste prompts and see who would answer each, how sure the router is, and which tokens decided. Nothing is generated, and nothing is counted."), form, results);
}

export function update() {}

async function onSubmit(event) {
  event.preventDefault();
  if (!isEnabled(run)) return;
  const all = (whole.checked ? [prompts.value] : prompts.value.split("\n")).map((each) => each.trim()).filter(Boolean);
  const asked = all.slice(0, MOST_PROMPTS);
  if (!asked.length) return text(status, "There is no prompt to route.");
  enable(run, false);
  text(status, "Asking …");
  const items = asked.map((prompt) => el("li", { class: "card" }, el("p", { class: "prompt" }, prompt)));
  results.replaceChildren(...items);
  const start = performance.now();
  await inTurns(asked, (prompt, index) => showDecision(items[index], prompt));
  enable(run, true);
  const left = all.length - asked.length;
  return text(status, `${asked.length} routed in ${latency((performance.now() - start) / 1000)}${left ? `; the other ${left} were left out, ${MOST_PROMPTS} are the most` : ""}.`);
}

// Does some things at a time, in order.
async function inTurns(items, work) {
  let next = 0;
  const worker = async () => {
    while (next < items.length) {
      const mine = next++;
      await work(items[mine], mine);
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, worker));
}

async function showDecision(item, prompt) {
  try {
    const decision = await ask("POST", "v1/route", { prompt, explain: true });
    item.append(...decided(decision));
  } catch (error) {
    item.append(el("p", { class: "reason" }, error.message));
  }
}

function decided({ expert, domain, confidence, reason, probabilities, explanation, error, seconds }) {
  const why = `${REASONS[reason] ?? reason}; ${percent(confidence)} for ${domain}, in ${latency(seconds)}`;
  const verdict = el("p", { class: "verdict" }, el("strong", { class: expert === null ? "base" : "expert" }, expert ?? "base"), el("span", { class: "detail" }, why));
  const broken = error ? el("p", { class: "reason" }, error) : null;
  const parts = el("div", { class: "why" }, domains(probabilities, explanation), tokensOf(explanation));
  return [verdict, broken, parts].filter((each) => each !== null);
}

function domains(probabilities, explanation) {
  const ranked = Object.entries(probabilities).sort((a, b) => b[1] - a[1]);
  const rows = ranked.slice(0, MOST_DOMAINS).map(([name, share]) => {
    const threshold = own(explanation?.thresholds, name) ?? null;
    const chart = bar(name === explanation?.domain ? "winner" : "");
    drawBar(chart, share, threshold);
    const needs = threshold === null ? "" : `${percent(threshold)} needed`;
    return el("li", {}, el("span", { class: "domain", title: name }, name), chart, el("span", { class: "share" }, percent(share), el("span", { class: "needs" }, needs)));
  });
  const left = ranked.length - rows.length;
  const more = left > 0 ? [el("li", { class: "detail" }, `and ${left} more`)] : [];
  return el("ul", { class: "domains", "aria-label": "Probabilities" }, ...rows, ...more);
}

function tokensOf(explanation) {
  if (!explanation) return el("p", { class: "detail" }, "There is no explanation.");
  const { tokens, domain, runner_up: other, encoder_lead: lead } = explanation;
  const most = Math.max(...tokens.map((token) => Math.abs(token.lead)), 1e-9);
  const chips = tokens.map((token) => {
    const chip = el("li", { class: token.lead >= 0 ? "chip for" : "chip against" }, el("code", {}, shown(token.text)), el("span", {}, signed(token.lead)));
    chip.style.setProperty("--weight", (Math.abs(token.lead) / most).toFixed(2));
    return chip;
  });
  const meaning = lead === null ? "" : ` The meaning of the sentence adds ${signed(lead)}.`;
  return el("div", {}, el("p", { class: "detail" }, `Tokens for ${domain} (+) or ${other} (−).${meaning}`), el("ul", { class: "chips", "aria-label": "Tokens that decided" }, ...chips));
}

function signed(lead) {
  return `${lead >= 0 ? "+" : "−"}${Math.abs(lead).toFixed(2)}`;
}

// A token's blanks are part of it, so they are made visible.
function shown(token) {
  return token.replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
}
