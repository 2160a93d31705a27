// SPDX-License-Identifier: Apache-2.0
// The figures of one comparison, each from the rows that the filter leaves. A figure without content is a sentence.
"use strict";

function figure(title, caption, ...content) {
  return make("figure", {}, make("figcaption", {}, make("h3", {}, title), make("p", {}, caption)), ...content);
}

const withRuns = (rows) => rows.filter((row) => row.role !== "teacher");
const recordsOf = (row) => row.runs.map((hash) => DATA.runs[hash].record);

function gapFigure(block, rows) {
  const methods = rows.filter((row) => row.role === "method");
  if (!methods.length) return null;
  const gap = methods.some((row) => row.gap !== null);
  const bars = methods.map((row) => {
    const [value, interval] = gap ? [row.gap, row.gap_interval] : [row.difference, row.interval];
    const scaled = (part) => (part === null || part === undefined ? null : 100 * part);
    const why = row.score === null ? "no finished run" : "no baseline of the same seed";
    return {
      name: row.method,
      verdict: row.verdict,
      value: scaled(value),
      low: scaled(interval?.[0]),
      high: scaled(interval?.[1]),
      why,
    };
  });
  bars.sort((a, b) => (b.value ?? -Infinity) - (a.value ?? -Infinity));
  const used = new Set(bars.map((bar) => bar.verdict || "none"));
  const key = make(
    "p",
    { class: "key" },
    Object.entries(VERDICTS)
      .filter(([name]) => used.has(name))
      .map(([name, [sign, words]]) => make("span", { class: name.replace(" ", "-") }, `${sign} ${words}`)),
  );
  if (gap) {
    const caption =
      "0 is the baseline, 100 the teacher. Whiskers: 95 % intervals over paired seeds (Fieller), " +
      "not corrected for the number of methods; an arrow where one goes on beyond the figure.";
    const marks = [
      [0, "baseline"],
      [100, "teacher"],
    ];
    return figure(
      "Share of the gap closed",
      caption,
      scroll(
        barChart(bars, "Share of the gap closed by method", "% of the gap between baseline and teacher", marks, "%"),
      ),
      key,
    );
  }
  const single = methods.some((row) => row.interval && row.over === "images");
  const caption =
    "No teacher's score above the baseline's is known, so there is no gap: this is the difference in points. " +
    `Whiskers: 95 % intervals over paired seeds${single ? ", of a single seed over images" : ""}; an arrow where one ` +
    "goes on beyond the figure.";
  return figure(
    "Difference to the baseline",
    caption,
    scroll(
      barChart(bars, "Difference to the baseline by method", `${block.metric}, points`, [[0, "baseline"]], "points"),
    ),
    key,
  );
}

const COSTS = {
  macs: ["student's multiply-accumulates, G", 1e-9],
  parameters: ["student's parameters, M", 1e-6],
  train_seconds: ["training time, min", 1 / 60],
  images_per_second: ["training, images/s", 1],
  peak_memory_mib: ["peak memory of training, GiB", 1 / 1024],
  teacher_share: ["teacher's share of the step, %", 100],
  latency_p50: ["student's latency, ms (median)", 1000],
};

function costFigure(block, rows) {
  const others = DATA.blocks.filter(
    (other) => other !== block && ["data", "split", "metric"].every((key) => other[key] === block[key]),
  );
  const elsewhere = others.flatMap((other) =>
    withRuns(other.rows)
      .filter((row) => row.role === "method" || other.student !== block.student)
      .map((row) => [row, other]),
  );
  const all = [...withRuns(rows).map((row) => [row, block]), ...elsewhere].filter(([row]) => row.score !== null);
  if (!all.length) return null;
  const varied = (key) => new Set(all.map(([row]) => row[key]).filter((value) => value !== null)).size > 1;
  const known = Object.keys(COSTS).filter((key) => all.some(([row]) => row[key] !== null));
  const teacher = block.rows.find((row) => row.role === "teacher" && row.score !== null);
  const plot = make("div", { class: "plot" });
  const choice = make(
    "select",
    { "aria-label": "cost on the horizontal axis", onchange: () => show(choice.value) },
    known.map((key) => make("option", { value: key }, COSTS[key][0])),
  );
  const show = (key) => {
    const [name, factor] = COSTS[key];
    const dots = all
      .filter(([row]) => row[key] !== null)
      .map(([row, home]) => ({
        name: home === block ? row.method : `${row.method} (${home.student})`,
        index: row.index,
        x: row[key] * factor,
        y: 100 * row.score,
        std: row.std === null ? null : 100 * row.std,
        other: home !== block,
      }));
    const levels = teacher ? [[100 * teacher.score, "teacher"]] : [];
    plot.replaceChildren(scatterChart(dots, `${block.metric} against ${name}`, name, `${block.metric}, %`, levels));
  };
  choice.value = known.find(varied) || known[0];
  show(choice.value);
  const context = others.length ? " Hollow: the other comparisons on this data." : "";
  return figure(
    `${block.metric} against cost`,
    `Mean of the seeds; whiskers: ± one standard deviation.${context}`,
    choice,
    plot,
  );
}

/** Method by class: differences to the baseline on a colour scale, the baseline itself as it is. */
function heatFigure(block, rows) {
  const title = "By class, against the baseline";
  const shown = rows.filter((row) => row.by_class !== null);
  if (!shown.length) return "No table by class: no record of this comparison has a result by class.";
  const reach = Math.max(
    0.001,
    ...shown
      .filter((row) => row.role === "method")
      .flatMap((row) => Object.values(row.by_class).map((cell) => Math.abs(cell.difference ?? 0))),
  );
  const names = make(
    "tr",
    {},
    make("th", { scope: "col" }, "points"),
    block.classes.map((name) => make("th", { scope: "col", title: name }, make("span", {}, name))),
  );
  const lines = shown.map((row) =>
    make(
      "tr",
      { class: row.role },
      make("th", { scope: "row" }, row.method),
      block.classes.map((name) => {
        const { value, difference } = row.by_class[name];
        const absolute = row.role === "baseline" || difference === null;
        const compared = absolute ? "" : `, ${points(difference)} points to the baseline`;
        const cell = make(
          "td",
          { title: `${row.method}, ${name}: ${percent(value)} %${compared}` },
          absolute ? percent(value, 0) : number(difference, 0, 100, true),
        );
        if (!absolute) {
          cell.style.setProperty("--strength", `${Math.round(70 * Math.min(1, Math.abs(difference) / reach))}%`);
          cell.className = difference >= 0 ? "gain" : "loss";
        }
        return cell;
      }),
    ),
  );
  const caption =
    `${block.class_metric} by class: difference to the baseline in points (mean over paired seeds), blue above it, ` +
    `orange below it; the teacher's may be off the scale of colours. Rows without colour: ${block.class_metric} in %.`;
  return dress(
    figure(
      title,
      caption,
      scroll(
        make(
          "table",
          { class: block.classes.length > 14 ? "heat narrow" : "heat" },
          make("thead", {}, names),
          make("tbody", {}, lines),
        ),
      ),
    ),
    { class: "wide" },
    [],
  );
}

function pictureFigure(block) {
  const title = "Predictions";
  if (!block.picture) return `No pictures: ${block.picture_note}`;
  return dress(
    figure(
      title,
      block.picture_note,
      scroll(make("img", { src: block.picture, alt: `Test images with truth and predictions: ${block.picture_note}` })),
    ),
    { class: "wide" },
    [],
  );
}

/** What may be wider than the page scrolls by itself. */
function scroll(content) {
  return make("div", { class: "scroll", tabindex: "0" }, content);
}
