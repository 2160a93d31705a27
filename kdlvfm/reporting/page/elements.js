// SPDX-License-Identifier: Apache-2.0
// Building blocks: elements whose text is always text, numbers as people read them, and the ticks of an axis.
"use strict";

const NOTHING = "–";

/** An element with attributes, listeners (`onclick`) and children; strings become text nodes, never markup. */
function make(name, attributes = {}, ...children) {
  return dress(document.createElement(name), attributes, children);
}

/** The same for SVG. */
function draw(name, attributes = {}, ...children) {
  return dress(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function dress(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === false) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null));
  return element;
}

/** `value` times `factor` with `digits` decimals; a real minus sign, and a dash for what is unknown. */
function number(value, digits = 1, factor = 1, sign = false) {
  if (value === null || value === undefined || Number.isNaN(value)) return NOTHING;
  const rounded = Number((value * factor).toFixed(digits)) + 0;
  const text = Math.abs(rounded).toLocaleString("en-US", {
    minimumFractionDigits: digits,
    maximumFractionDigits: digits,
  });
  return (rounded < 0 ? "−" : sign && rounded > 0 ? "+" : "") + text;
}

const percent = (value, digits = 1) => number(value, digits, 100);
const points = (value) => number(value, 1, 100, true);

/** Three significant digits of a count in a unit: 11.5, 0.168. */
function size(value, unit) {
  if (value === null) return NOTHING;
  const scaled = value / unit;
  return number(scaled, scaled >= 100 ? 0 : scaled >= 10 ? 1 : scaled >= 1 ? 2 : 3);
}

function duration(seconds) {
  if (seconds === null) return NOTHING;
  if (seconds < 60) return `${number(seconds, 1)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${String(Math.round(seconds % 60)).padStart(2, "0")} s`;
  return `${number(seconds / 3600, 1)} h`;
}

/** A command as one could paste it into a shell. */
function shell(words) {
  return words.map((word) => (/^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`)).join(" ");
}

function mean(values) {
  const known = values.filter((value) => value !== null && value !== undefined);
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

/** Round numbers that cover `low` to `high`, about `count` of them. */
function ticks(low, high, count = 5) {
  const rough = (high - low || Math.abs(high) || 1) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough * 0.999);
  const first = Math.floor(low / step + 1e-9);
  const last = Math.max(first + 1, Math.ceil(high / step - 1e-9));
  return Array.from({ length: last - first + 1 }, (_, index) => Number(((first + index) * step).toPrecision(12)));
}

/** Labels of ticks, all with as many decimals as the finest step needs. */
function tickLabels(values) {
  const step = values[1] - values[0];
  const digits = Math.max(
    0,
    ...values.map((value) => (String(Number(value.toPrecision(6))).split(".")[1] || "").length),
  );
  return values.map((value) => number(value, step >= 1 && Number.isInteger(step) ? 0 : Math.min(digits, 6)));
}
