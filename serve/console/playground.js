// One prompt, streamed side by side to base, auto and two experts.

import { stream } from "./api.js";
import { el, enable, field, fill, heading, isEnabled, keyed, set, text } from "./dom.js";
import { look, server } from "./watch.js";
import { count, digits, latency, percent } from "./words.js";

const REASONS = { router: "the router is sure", abstain: "the router is not sure", "router-error": "the router could not decide" };
const ENDS = { stop: "ended by itself", length: "stopped at the most tokens" };

const prompt = el("textarea", { rows: 3, onkeydown: onKey }, "What is 17 times 23?");
const tokens = el("input", { type: "number", min: 1, max: 32768, value: 128 });
const warmth = el("input", { type: "number", min: 0, max: 2, step: 0.1, value: 0 });
const chat = el("input", { type: "checkbox", checked: true });
const send = el("button", { type: "submit", class: "primary" }, "Ask all four");
const stop = el("button", { type: "button", onclick: () => stopAll() }, "Stop");
const columns = [column("Base"), column("Auto"), column("Expert", 0), column("Expert", 1)];
let running = null;

export function mount(root) {
  const settings = el("div", { class: "fields" }, field("Max tokens", tokens), field("Temperature", warmth), el("label", { class: "check" }, chat, "Use the chat template"));
  const form = el("form", { class: "card ask", onsubmit: onSubmit }, field("Prompt", prompt), settings, el("div", { class: "buttons" }, send, stop, el("span", { class: "hint" }, "Ctrl + Enter asks")));
  enable(stop, false);
  root.append(
    heading("Playground", "One prompt, answered at the same time by the base, by whom the router picks, and by two experts of your choice."),
    form,
    el("div", { class: "answers" }, ...columns.map((each) => each.node)),
  );
}

function column(title, which = null) {
  const select = which === null ? null : el("select", { "aria-label": `Expert ${which + 1}`, onchange: () => reset(parts) });
  const who = el("span", { class: "who" });
  const answer = el("pre", { class: "answer", tabindex: "0", role: "region", "aria-label": `Answer of ${title.toLowerCase()}${which === null ? "" : ` ${which + 1}`}` });
  const figures = el("p", { class: "detail", role: "status" });
  const head = el("h2", {}, which === null ? title : `${title} ${which + 1}`);
  const node = el("article", { class: "card" }, el("header", {}, head, select ?? el("span", { class: "model" })), who, answer, figures);
  const parts = { node, select, who, answer, figures, which, title };
  return parts;
}

export function update() {
  const names = server.experts.filter((expert) => !expert.error).map((expert) => expert.id);
  for (const each of columns) {
    if (each.select !== null) updateSelect(each, names);
    else text(each.node.querySelector(".model"), each.title === "Base" ? server.base ?? "" : server.hasAuto ? "the router picks" : "no router");
  }
  enable(send, running === null && server.base !== null);
}

// Keeps what was chosen; an expert that is gone leaves a sentence in its column.
function updateSelect(each, names) {
  const { select, which } = each;
  const before = select.value;
  keyed(select, names, (name) => name, (name) => el("option", { value: name }, name), () => {});
  set(select, "hidden", names.length === 0);
  if (names.includes(before)) return;
  if (before !== "" && running === null) said(each, `${before} is no longer on offer.`);
  select.value = names[Math.min(which, names.length - 1)] ?? "";
}

function reset({ who, answer, figures }) {
  for (const part of [who, answer, figures]) text(part, "");
  set(answer, "class", "answer");
}

function said({ answer }, words) {
  text(answer, words);
  set(answer, "class", "answer quiet");
}

function modelOf(each) {
  if (each.select !== null) return each.select.value;
  return each.title === "Base" ? server.base : "auto";
}

function onKey(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) onSubmit(event);
}

async function onSubmit(event) {
  event.preventDefault();
  if (!isEnabled(send)) return;
  running = new AbortController();
  enable(send, false);
  enable(stop, true);
  await Promise.all(columns.map((each) => fillColumn(each, running.signal)));
  running = null;
  enable(send, true);
  enable(stop, false);
  look();
}

function stopAll() {
  if (isEnabled(stop)) running?.abort();
}

async function fillColumn(each, signal) {
  reset(each);
  if (each.title === "Auto" && !server.hasAuto) return said(each, "No router is configured: fit one with deltamux router fit.");
  if (each.select !== null && !each.select.value) return said(each, "No expert is on offer.");
  const state = { start: performance.now(), first: null, pieces: 0, tokens: null, end: null };
  said(each, "Waiting for the first token …");
  try {
    await read(each, state, signal);
    if (state.first === null) said(each, `The model answered with nothing: it ended at once${state.end ? ` (${ENDS[state.end] ?? state.end})` : ""}.`);
  } catch (error) {
    const stopped = error.name === "AbortError";
    if (state.first === null) said(each, stopped ? "Stopped." : error.message);
    if (!stopped) set(each.answer, "class", "answer failed");
    state.end = stopped ? "stopped" : error.message;
  }
  showFigures(each, state);
  return undefined;
}

async function read(each, state, signal) {
  const model = modelOf(each);
  const events = stream(chat.checked ? "v1/chat/completions" : "v1/completions", bodyOf(model), signal, (headers) => showWho(each, headers));
  for await (const event of events) {
    if (event.usage) state.tokens = event.usage.completion_tokens;
    for (const choice of event.choices ?? []) {
      const piece = choice.delta?.content ?? choice.text ?? "";
      state.end = choice.finish_reason ?? state.end;
      if (piece) add(each, state, piece);
    }
  }
}

function bodyOf(model) {
  const asked = chat.checked ? { messages: [{ role: "user", content: prompt.value }] } : { prompt: prompt.value };
  const given = Number(tokens.value);
  return { model, ...asked, max_tokens: given >= 1 ? Math.floor(given) : 128, temperature: Number(warmth.value) || 0, stream: true, stream_options: { include_usage: true } };
}

function add(each, state, piece) {
  const { answer } = each;
  if (state.first === null) {
    state.first = performance.now();
    text(answer, "");
    set(answer, "class", "answer");
  }
  // Who has scrolled up to read is left there.
  const atEnd = answer.scrollHeight - answer.scrollTop - answer.clientHeight < 24;
  answer.append(piece);
  state.pieces += 1;
  if (atEnd) answer.scrollTop = answer.scrollHeight;
}

function showWho({ who }, headers) {
  const expert = headers.get("x-deltamux-expert");
  const reason = headers.get("x-deltamux-reason");
  if (expert === null) return;
  const sure = `${percent(Number(headers.get("x-deltamux-confidence")))} for ${headers.get("x-deltamux-domain")}`;
  fill(who, "answered by ", el("strong", {}, expert), reason === "explicit" ? "" : `: ${REASONS[reason] ?? reason}, ${sure}`);
}

function showFigures({ figures }, state) {
  const seconds = (performance.now() - (state.first ?? state.start)) / 1000;
  const made = state.tokens ?? state.pieces;
  const words = [];
  if (state.first !== null) words.push(`first token after ${latency((state.first - state.start) / 1000)}`);
  if (made) words.push(count(made, "token", "tokens"));
  if (made > 1 && seconds > 0 && state.first !== null) words.push(`${digits((made - 1) / seconds)} tokens/s`);
  if (state.end !== null) words.push(ENDS[state.end] ?? state.end);
  text(figures, words.join(" · "));
}
