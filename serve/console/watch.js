// Asks the server how it is, every two seconds while somebody looks, and keeps what was seen.

import { ask, page, readiness } from "./api.js";
import { parse, sums, total } from "./metrics.js";
import { Residency } from "./residency.js";

const EVERY_MS = 2000;
// How far back the page looks, and over what a rate is taken.
export const PAST_MS = 15 * 60_000;
const RATE_MS = 10_000;
const PREFIXES = "deltamux_";

// What is known of the server. `away` and `locked` hold the error while there is one.
export const server = {
  at: 0,
  experts: [],
  slots: 0,
  base: null,
  hasAuto: false,
  ready: null,
  samples: null,
  samplesError: null,
  version: "",
  away: null,
  locked: null,
  history: [],
  residency: new Residency(PAST_MS),
};

const listeners = new Set();
let timer = null;
let asking = false;

export function onChange(listener) {
  listeners.add(listener);
}

// Asks now, and goes on asking.
export function look() {
  clearTimeout(timer);
  if (!asking) poll();
}

export function start() {
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) look();
  });
  addEventListener("pagehide", () => server.residency.save());
  look();
}

async function poll() {
  asking = true;
  try {
    await observe();
    server.away = server.locked = null;
  } catch (error) {
    blame(error);
  }
  asking = false;
  for (const listener of listeners) listener(server);
  // Without a key, or unseen, there is nothing to ask for.
  if (!document.hidden && server.locked === null) timer = setTimeout(poll, EVERY_MS);
}

function blame(error) {
  if (error.status === 401) {
    server.locked = error;
    server.away = null;
    return;
  }
  server.away = error;
}

async function observe() {
  // A server that came back may be another one, with another base.
  const models = server.base === null || server.away ? await ask("GET", "v1/models") : null;
  const [listed, ready, samples] = await Promise.all([
    ask("GET", "v1/experts"),
    readiness(),
    page("metrics").then((text) => parse(text, PREFIXES)).catch((error) => error),
  ]);
  server.at = Date.now();
  if (models !== null) readModels(models);
  server.experts = listed.data;
  server.slots = listed.slots ?? 0;
  server.ready = ready;
  server.samples = samples instanceof Map ? samples : null;
  server.samplesError = samples instanceof Map ? null : samples;
  server.residency.observe(server.experts, server.at);
  remember();
}

function readModels(models) {
  server.base = models.data.find((model) => !model.parent)?.id ?? "base";
  server.hasAuto = models.data.some((model) => model.id === "auto");
}

// Counters of this moment; a server that was restarted counts from 0 again, and so does the page.
function remember() {
  const { samples, history } = server;
  if (samples === null) return;
  const info = samples.get("deltamux_build_info")?.[0]?.labels;
  server.version = info ? `deltamux ${info.version}, vLLM ${info.vllm_version}` : "";
  const seen = {
    at: server.at,
    requests: sums(samples, "deltamux_requests_total", "expert"),
    tokens: sums(samples, "deltamux_tokens_total", "expert", { kind: "generated" }),
    swaps: sums(samples, "deltamux_swaps_total", "expert", { tier: "slot" }),
    running: total(samples, "deltamux_requests_in_flight", { state: "running" }),
    waiting: total(samples, "deltamux_requests_in_flight", { state: "waiting" }),
    used: sums(samples, "deltamux_memory_used_bytes", "place"),
  };
  const last = history.at(-1);
  if (last && all(seen.requests) < all(last.requests)) history.length = 0;
  history.push(seen);
  while (history[0].at < server.at - PAST_MS) history.shift();
}

function all(counts) {
  return [...counts.values()].reduce((sum, value) => sum + value, 0);
}

// What a counter grew by a second, over the last seconds; of one expert, or of all.
export function rate(counter, expert = null, end = server.history.length - 1) {
  const { history } = server;
  const now = history[end];
  if (!now) return NaN;
  let first = end;
  while (first > 0 && now.at - history[first - 1].at <= RATE_MS) first -= 1;
  const before = history[first];
  if (before === now) return 0;
  const of = (seen) => (expert === null ? all(seen[counter]) : seen[counter].get(expert) ?? 0);
  return (Math.max(of(now) - of(before), 0) * 1000) / (now.at - before.at);
}

// The course of a rate, as [time, value] pairs.
export function course(counter) {
  return server.history.map((seen, index) => [seen.at, rate(counter, null, index)]);
}
