// Small drawings in SVG.

import { el, keyed, set, svg, text } from "./dom.js";
import { duration } from "./words.js";

const WIDTH = 120;
const HEIGHT = 28;

// A line without axes; its figures stand beside it.
export function sparkline() {
  const line = svg("polyline", { class: "spark-line" });
  const area = svg("polygon", { class: "spark-area" });
  const box = { class: "spark", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" };
  return svg("svg", box, area, line);
}

// Draws [time, value] pairs into a sparkline, the last at its right edge.
export function drawSparkline(chart, pairs, span) {
  const known = pairs.filter(([, value]) => Number.isFinite(value));
  const [area, line] = chart.children;
  if (known.length < 2) {
    set(line, "points", null);
    set(area, "points", null);
    return;
  }
  const end = known.at(-1)[0];
  const shown = Math.max(Math.min(end - known[0][0], span), 1);
  const top = Math.max(...known.map(([, value]) => value)) || 1;
  const points = known.map(([at, value]) => {
    const x = WIDTH - ((end - at) / shown) * WIDTH;
    return `${x.toFixed(1)},${(HEIGHT - 2 - (value / top) * (HEIGHT - 4)).toFixed(1)}`;
  });
  set(line, "points", points.join(" "));
  set(area, "points", `0,${HEIGHT} ${points.join(" ")} ${WIDTH},${HEIGHT}`);
}

// The tiers of an expert over time, as a strip of coloured spans.
export function timeline() {
  return svg("svg", { class: "timeline", viewBox: "0 0 1000 10", preserveAspectRatio: "none", role: "img" });
}

export function drawTimeline(chart, spans, now, past) {
  const x = (at) => Math.max(0, 1000 - ((now - at) / past) * 1000);
  keyed(
    chart,
    spans,
    (span) => String(span.start),
    () => svg("rect", { y: 0, height: 10 }),
    (rect, span) => {
      set(rect, "class", `where-${span.where}`);
      set(rect, "x", x(span.start).toFixed(1));
      set(rect, "width", Math.max(x(span.end) - x(span.start), 3).toFixed(1));
    },
  );
  set(chart, "aria-label", spokenTimeline(spans));
}

function spokenTimeline(spans) {
  if (!spans.length) return "not seen yet";
  const seconds = new Map();
  for (const { where, start, end } of spans) {
    seconds.set(where, (seconds.get(where) ?? 0) + (end - start) / 1000);
  }
  return [...seconds].map(([where, time]) => `${where} for ${duration(time)}`).join(", ");
}

// A horizontal bar of a share between 0 and 1; `mark` is a share that is pointed out in it.
export function bar(className = "") {
  return el("span", { class: `bar ${className}`, "aria-hidden": "true" }, el("span", { class: "bar-fill" }));
}

export function drawBar(chart, share, mark = null) {
  chart.firstElementChild.style.width = `${Math.min(Math.max(share, 0), 1) * 100}%`;
  let tick = chart.querySelector(".bar-mark");
  if (mark === null) {
    tick?.remove();
    return;
  }
  if (tick === null) chart.append((tick = el("span", { class: "bar-mark" })));
  tick.style.left = `${Math.min(Math.max(mark, 0), 1) * 100}%`;
}

// Parts of a whole in one bar: [{ name, share }].
export function drawStack(chart, parts) {
  keyed(
    chart,
    parts,
    (part) => part.name,
    (part) => el("span", { class: `part kind-${part.name}` }),
    (span, part) => {
      span.style.width = `${part.share * 100}%`;
      set(span, "title", part.title);
    },
  );
}

// A figure with its name and its course.
export function tile(name) {
  const figure = el("strong", {}, "–");
  const detail = el("span", { class: "detail" });
  const chart = sparkline();
  const node = el("div", { class: "tile" }, el("span", { class: "label" }, name), figure, detail, chart);
  return {
    node,
    show(value, words, pairs, span) {
      text(figure, value);
      text(detail, words);
      drawSparkline(chart, pairs, span);
    },
  };
}
