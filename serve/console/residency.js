// Where each expert was: the page notes it at each look, and keeps it while the tab is open.

const KEEP = "deltamux.residency";
// A longer pause than this between two looks is a time of which nothing is known.
const GAP_MS = 10_000;
const MINUTE_MS = 60_000;

export class Residency {
  constructor(pastMs) {
    this.pastMs = pastMs;
    this.spans = restored();
  }

  // Notes the tiers of the experts at a time in milliseconds.
  observe(experts, at) {
    for (const { id, tier, error } of experts) {
      const where = error ? "refused" : tier;
      if (!this.spans.has(id)) this.spans.set(id, []);
      const spans = this.spans.get(id);
      const last = spans.at(-1);
      const goesOn = last && at - last.end <= GAP_MS;
      if (goesOn) last.end = at;
      if (!goesOn || last.where !== where) spans.push({ where, start: at, end: at });
    }
    for (const [id, spans] of this.spans) {
      while (spans.length && spans[0].end < at - this.pastMs) spans.shift();
      if (!spans.length) this.spans.delete(id);
    }
  }

  // How far back anything is known, in whole minutes.
  reach(at) {
    const first = Math.min(at, ...[...this.spans.values()].map((spans) => spans[0].start));
    return Math.min(Math.max(Math.ceil((at - first) / MINUTE_MS), 1) * MINUTE_MS, this.pastMs);
  }

  of(id) {
    return this.spans.get(id) ?? [];
  }

  // For a page that is loaded again.
  save() {
    try {
      sessionStorage.setItem(KEEP, JSON.stringify([...this.spans]));
    } catch {
      sessionStorage.removeItem(KEEP);
    }
  }
}

function restored() {
  try {
    return new Map(JSON.parse(sessionStorage.getItem(KEEP) ?? "[]"));
  } catch {
    return new Map();
  }
}
