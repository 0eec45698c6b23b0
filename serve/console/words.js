// Numbers and times in words.

const SIZES = [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]];

// Three digits that matter.
export function digits(value) {
  if (!Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  if (Math.abs(value) >= 1e4) return Math.round(value).toLocaleString("en");
  if (Math.abs(value) >= 100) return value.toFixed(0);
  return value.toFixed(Math.abs(value) >= 10 ? 1 : 2);
}

export function bytes(value) {
  if (!Number.isFinite(value)) return "–";
  const [size, unit] = SIZES.find(([least]) => value >= least) ?? [1, "B"];
  return `${digits(value / size)} ${unit}`;
}

export function percent(share) {
  if (!Number.isFinite(share)) return "–";
  if (share > 0 && share < 0.001) return "< 0.1 %";
  return `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
}

export function bits(value) {
  return value === null || value === undefined ? "–" : value.toFixed(2);
}

export function duration(seconds) {
  if (seconds < 1) return `${Math.max(Math.round(1000 * seconds), 0)} ms`;
  if (seconds < 60) return `${Math.floor(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} d`;
}

// A short time, with one digit behind the point.
export function latency(seconds) {
  return seconds < 1 || seconds >= 60 ? duration(seconds) : `${seconds.toFixed(1)} s`;
}

export function ago(unixSeconds, nowMs) {
  if (!unixSeconds) return "never";
  const seconds = nowMs / 1000 - unixSeconds;
  return seconds < 2 ? "now" : `${duration(seconds)} ago`;
}

export function count(number, one, many) {
  return `${number} ${number === 1 ? one : many}`;
}
