// Numbers as people read them.

const BYTES = ["B", "kB", "MB", "GB", "TB"];
export const NONE = "–";

export function bytes(count) {
  if (count === null) return NONE;
  let unit = 0;
  while (count >= 999.5 && unit < BYTES.length - 1) {
    count /= 1000;
    unit += 1;
  }
  return `${unit === 0 ? count : three(count)} ${BYTES[unit]}`;
}

export function three(value) {
  if (!Number.isFinite(value)) return NONE;
  if (Math.abs(value) >= 100) return Math.round(value).toLocaleString("en");
  return value.toFixed(Math.abs(value) >= 10 ? 1 : 2);
}

export function ratio(numerator, denominator) {
  return denominator > 0 ? `${three(numerator / denominator)} ×` : NONE;
}

export function millions(count) {
  if (count >= 1e9) return `${three(count / 1e9)} B`;
  return `${three(count / 1e6)} M`;
}

export function plural(count, noun) {
  return `${count} ${noun}${count === 1 ? "" : "s"}`;
}
