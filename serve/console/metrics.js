// Prometheus' text format, as /metrics has it.

const SAMPLE = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/;
const LABEL = /([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const ESCAPES = { "\\n": "\n", '\\"': '"', "\\\\": "\\" };

// The samples of the metrics that begin with a prefix, by name.
export function parse(text, prefix) {
  const found = new Map();
  for (const line of text.split("\n")) {
    if (!line.startsWith(prefix)) continue;
    const match = SAMPLE.exec(line);
    if (match === null) continue;
    const labels = Object.create(null);
    for (const [, name, value] of (match[2] ?? "").matchAll(LABEL)) {
      labels[name] = value.replace(/\\[n"\\]/g, (escape) => ESCAPES[escape]);
    }
    if (!found.has(match[1])) found.set(match[1], []);
    found.get(match[1]).push({ labels, value: number(match[3]) });
  }
  return found;
}

function number(word) {
  return Number(word.replace("Inf", "Infinity"));
}

// The sum of a metric's samples by one label's value, of those that have all of `where`.
export function sums(samples, name, label, where = {}) {
  const found = new Map();
  for (const { labels, value } of samples.get(name) ?? []) {
    if (Object.entries(where).some(([key, wanted]) => labels[key] !== wanted)) continue;
    const key = labels[label] ?? "";
    found.set(key, (found.get(key) ?? 0) + value);
  }
  return found;
}

export function total(samples, name, where = {}) {
  return [...sums(samples, name, "", where).values()].reduce((sum, value) => sum + value, 0);
}
