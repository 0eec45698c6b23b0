// The page: its views, who the server is, whether it answers, and the reader's key.

import { key, setKey } from "./api.js";
import * as bench from "./bench.js";
import { set, text } from "./dom.js";
import * as experts from "./experts.js";
import * as memory from "./memory.js";
import { notice } from "./notices.js";
import * as playground from "./playground.js";
import * as router from "./router.js";
import { look, onChange, server, start } from "./watch.js";
import { duration } from "./words.js";

const VIEWS = { experts, playground, bench, router, memory };
// A header of HTTP holds no other letters.
const KEY_LETTERS = /^[\x21-\x7e]*$/;
const byId = (id) => document.getElementById(id);
const dialog = byId("key-dialog");
const seen = { names: null, away: false };
let shown = "";

function show(name) {
  shown = name;
  for (const each of Object.keys(VIEWS)) set(byId(`view-${each}`), "hidden", each !== name);
  for (const link of document.querySelectorAll("nav a")) {
    set(link, "aria-current", link.hash === `#${name}` ? "page" : null);
  }
  const title = byId(`view-${name}`).querySelector("h1");
  document.title = `${title.textContent} · deltamux`;
  VIEWS[name].update();
}

function onHash() {
  const name = location.hash.slice(1);
  if (!Object.hasOwn(VIEWS, name)) return;
  show(name);
  byId(`view-${name}`).querySelector("h1").focus({ preventScroll: true });
  scrollTo(0, 0);
}

function onServer() {
  showState();
  if (server.locked !== null) openKey(key() ? server.locked.message : "This server wants an API key.");
  if (server.locked === null && server.away === null) tellOfChanges();
  seen.away = server.away !== null;
  VIEWS[shown].update();
}

function showState() {
  const { away, locked, ready } = server;
  const [words, kind] = state(away, locked, ready);
  text(byId("ready"), words);
  set(byId("ready"), "class", `pill ${kind}`);
  set(byId("ready"), "title", reasons(ready));
  text(byId("away"), away ? awayWords(away) : notReady(ready, locked));
  set(byId("away"), "class", away ? "error" : "");
  set(document.body, "class", away ? "stale" : null);
  const who = [server.base ? `base ${server.base}` : "", server.version].filter(Boolean).join(" · ");
  text(byId("about"), who);
  text(byId("key-button"), key() ? "Change key" : "Set key");
}

function state(away, locked, ready) {
  if (away) return ["Away", "where-refused"];
  if (locked) return ["Locked", "where-host"];
  if (ready === null) return ["Connecting", ""];
  return ready.ready ? ["Ready", "where-slot"] : ["Not ready", "where-host"];
}

function awayWords(away) {
  const age = server.at ? ` What is shown is ${duration((Date.now() - server.at) / 1000)} old.` : "";
  return `${away.message} Asking again every 2 seconds.${age}`;
}

function notReady(ready, locked) {
  if (locked || ready === null || ready.ready) return "";
  return `The server is not ready: ${reasons(ready) || "an administrator's key shows why"}.`;
}

// Who is no administrator gets none.
function reasons(ready) {
  return ready?.reasons?.join("; ") ?? "";
}

// Experts that came or went since the last look, and a server that came back.
function tellOfChanges() {
  const names = new Set(server.experts.map((expert) => expert.id));
  if (seen.away) notice("The server is back.");
  if (seen.names !== null) {
    tell([...seen.names].filter((name) => !names.has(name)), "is no longer on offer");
    tell([...names].filter((name) => !seen.names.has(name)), "is on offer now");
  }
  seen.names = names;
}

function tell(names, what) {
  if (names.length === 0) return;
  const rest = names.length > 1 ? ` (and ${names.length - 1} more)` : "";
  notice(`${names[0]}${rest} ${what}.`);
}

function openKey(why) {
  text(byId("key-why"), why);
  if (dialog.open) return;
  byId("key-input").value = "";
  dialog.showModal();
}

function useKey(value) {
  if (!KEY_LETTERS.test(value)) {
    text(byId("key-why"), "A key is one word of plain letters, digits and signs.");
    return;
  }
  setKey(value);
  dialog.close();
  look();
}

function wireKey() {
  byId("key-button").addEventListener("click", () => openKey(key() ? "Another key takes the place of the one in use." : "A server that was started with a key wants it."));
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    useKey(byId("key-input").value.trim());
  });
  byId("key-forget").addEventListener("click", () => useKey(""));
  byId("key-cancel").addEventListener("click", () => dialog.close());
}

for (const [name, view] of Object.entries(VIEWS)) view.mount(byId(`view-${name}`));
wireKey();
const first = location.hash.slice(1);
show(Object.hasOwn(VIEWS, first) ? first : "experts");
addEventListener("hashchange", onHash);
onChange(onServer);
start();
