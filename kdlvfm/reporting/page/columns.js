// SPDX-License-Identifier: Apache-2.0
// The columns of the table: their heads, the values they sort by, and the text of a row.
"use strict";

const COLUMNS = [
  { title: "method", unit: "", value: (row) => row.method, text: (row) => row.method },
  {
    title: null,
    unit: "%",
    value: (row) => row.score,
    text: (row) => percent(row.score) + (row.std === null ? "" : ` ± ${percent(row.std)}`),
  },
  {
    title: "vs baseline",
    unit: "points [95 % CI]",
    value: (row) => row.difference,
    text: (row) => points(row.difference) + range(row.interval, points) + mark(row.over, row.interval),
  },
  {
    title: "vs equal time",
    unit: "points [95 % CI]",
    optional: true,
    value: (row) => row.longer && row.longer.mean,
    text: ({ longer }) =>
      longer ? points(longer.mean) + range(longer.interval, points) + mark(longer.over, longer.interval) : NOTHING,
  },
  {
    title: "gap closed",
    unit: "% [95 % CI]",
    value: (row) => row.gap,
    text: (row) => percent(row.gap, 0) + range(row.gap_interval, (x) => percent(x, 0)),
  },
  { title: "verdict", unit: "5 %, Holm", value: (row) => row.p_value, text: verdict },
  {
    title: "paper",
    unit: "%",
    optional: true,
    value: (row) => row.published && row.published.value,
    text: ({ published }) => (published ? `${percent(published.value)} [${published.source}]` : NOTHING),
  },
  { title: "params", unit: "M", value: (row) => row.parameters, text: (row) => size(row.parameters, 1e6) },
  { title: "MACs", unit: "G", value: (row) => row.macs, text: (row) => size(row.macs, 1e9) },
  {
    title: "latency",
    unit: "ms, p50 / p95",
    optional: true,
    value: (row) => row.latency_p50,
    text: ({ latency_p50: p50, latency_p95: p95 }) =>
      p50 === null ? NOTHING : `${size(p50, 0.001)} / ${size(p95, 0.001)}`,
  },
  {
    title: "inference",
    unit: "images/s",
    optional: true,
    value: (row) => row.inference_images_per_second,
    text: (row) => size(row.inference_images_per_second, 1),
  },
  { title: "training", unit: "time", value: (row) => row.train_seconds, text: (row) => duration(row.train_seconds) },
  {
    title: "speed",
    unit: "images/s",
    value: (row) => row.images_per_second,
    text: (row) => number(row.images_per_second, 0),
  },
  { title: "memory", unit: "GiB", value: (row) => row.peak_memory_mib, text: (row) => size(row.peak_memory_mib, 1024) },
  {
    title: "teacher",
    unit: "% of step",
    value: (row) => row.teacher_share,
    text: (row) => percent(row.teacher_share, 0),
  },
  { title: "seeds", unit: "", value: (row) => row.finished, text: (row) => row.seeds },
];

function range(interval, text) {
  return interval ? ` [${text(interval[0])}, ${text(interval[1])}]` : "";
}

/** The sign of an interval over the images of one seed; a note below the table says what it means. */
function mark(over, interval) {
  return interval && over === "images" ? "†" : "";
}

function verdict(row) {
  return row.verdict ? `${VERDICTS[row.verdict][0]} ${row.verdict}` : NOTHING;
}

function verdictCell(row) {
  const title = row.verdict ? `p = ${number(row.p_value, 4)} after the correction for several methods` : null;
  return make("td", { class: `verdict ${(row.verdict || "none").replace(" ", "-")}`, title }, verdict(row));
}

/** The columns of one comparison: without those that are optional and that no row fills. */
function columnsOf(block) {
  return COLUMNS.filter((column) => !column.optional || block.rows.some((row) => column.value(row) !== null));
}
