// SPDX-License-Identifier: Apache-2.0
// The figures of one comparison, each from the rows that the filter leaves.
"use strict";

const SHOWN_AT_FIRST = 8;

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
    return { name: row.method, verdict: row.verdict, value: scaled(value), low: scaled(interval?.[0]), high: scaled(interval?.[1]), why };
  });
  bars.sort((a, b) => (b.value ?? -Infinity) - (a.value ?? -Infinity));
  const used = new Set(bars.map((bar) => bar.verdict || "none"));
  const key = make("p", { class: "key" }, Object.entries(VERDICTS).filter(([name]) => used.has(name)).map(([name, [sign, words]]) =>
    make("span", { class: name.replace(" ", "-") }, `${sign} ${words}`)));
  if (gap) {
    const caption = "0 is the baseline, 100 the teacher. Whiskers: 95 % intervals over paired seeds (Fieller), not corrected for the number of methods.";
    const marks = [[0, "baseline"], [100, "teacher"]];
    return figure("Share of the gap closed", caption, scroll(barChart(bars, "Share of the gap closed by method", "% of the gap between baseline and teacher", marks, "%")), key);
  }
  const caption = "No teacher's score above the baseline's is known, so there is no gap: this is the difference in points. Whiskers: 95 % intervals over paired seeds.";
  return figure("Difference to the baseline", caption, scroll(barChart(bars, "Difference to the baseline by method", `${block.metric}, points`, [[0, "baseline"]], "points")), key);
}

const COSTS = {
  macs: ["student's multiply-accumulates, G", 1e-9],
  parameters: ["student's parameters, M", 1e-6],
  train_seconds: ["training time, min", 1 / 60],
  images_per_second: ["training, images/s", 1],
  peak_memory_mib: ["peak memory of training, GiB", 1 / 1024],
  teacher_share: ["teacher's share of the step, %", 100],
};

function costFigure(block, rows) {
  const others = DATA.blocks.filter((other) => other !== block && ["data", "split", "metric"].every((key) => other[key] === block[key]));
  const elsewhere = others.flatMap((other) => withRuns(other.rows).filter((row) => row.role === "method" || other.student !== block.student).map((row) => [row, other]));
  const all = [...withRuns(rows).map((row) => [row, block]), ...elsewhere].filter(([row]) => row.score !== null);
  if (!all.length) return null;
  const varied = (key) => new Set(all.map(([row]) => row[key]).filter((value) => value !== null)).size > 1;
  const known = Object.keys(COSTS).filter((key) => all.some(([row]) => row[key] !== null));
  const teacher = block.rows.find((row) => row.role === "teacher" && row.score !== null);
  const plot = make("div", { class: "plot" });
  const choice = make("select", { "aria-label": "cost on the horizontal axis", onchange: () => show(choice.value) },
    known.map((key) => make("option", { value: key }, COSTS[key][0])));
  const show = (key) => {
    const [name, factor] = COSTS[key];
    const dots = all.filter(([row]) => row[key] !== null).map(([row, home]) => ({
      name: home === block ? row.method : `${row.method} (${home.student})`, index: row.index, x: row[key] * factor,
      y: 100 * row.score, std: row.std === null ? null : 100 * row.std, other: home !== block,
    }));
    const levels = teacher ? [[100 * teacher.score, "teacher"]] : [];
    plot.replaceChildren(scatterChart(dots, `${block.metric} against ${name}`, name, `${block.metric}, %`, levels));
  };
  choice.value = known.find(varied) || known[0];
  show(choice.value);
  const context = others.length ? " Hollow: the other comparisons on this data." : "";
  return figure(`${block.metric} against cost`, `Mean of the seeds; whiskers: ± one standard deviation.${context}`, choice, plot);
}

/** Lines with a legend whose entries switch them on and off. */
function lineFigure(title, caption, series, xTitle, yTitle) {
  const hidden = new Set(series.slice(SHOWN_AT_FIRST));
  const plot = make("div", { class: "plot" });
  const show = () => {
    const shown = series.filter((one) => !hidden.has(one));
    plot.replaceChildren(shown.length ? lineChart(shown, title, xTitle, yTitle) : make("p", { class: "absent" }, "Nothing is switched on."));
  };
  const legend = make("div", { class: "legend" }, series.map((one) => {
    const sample = draw("svg", { viewBox: "0 0 30 12", "aria-hidden": "true" },
      draw("line", { x1: 0, x2: 30, y1: 6, y2: 6, stroke: colour(one.index), "stroke-dasharray": dashes(one.index) }), marker(one.index, 15, 6));
    const button = make("button", { type: "button", "aria-pressed": String(!hidden.has(one)), onclick: () => {
      if (!hidden.delete(one)) hidden.add(one);
      button.setAttribute("aria-pressed", String(!hidden.has(one)));
      show();
    } }, sample, one.name);
    return button;
  }));
  show();
  return figure(title, caption, plot, legend);
}

function curveFigure(block, rows) {
  const series = withRuns(rows).map((row) => ({
    name: row.method, index: row.index, score: row.score,
    lines: recordsOf(row).map((record) => record.curve.map((point) => [point.step, point.metrics[block.metric_key] ?? null])
      .filter((point) => point[1] !== null).map(([step, value]) => [step, 100 * value])).filter((line) => line.length),
  })).filter((one) => one.lines.length);
  const title = "Learning curves";
  if (!series.length) return "No learning curves: no run of this comparison measured its validation split on the way (recipe.val_every).";
  // The baseline, whose index is 0, is always among those shown at first.
  series.sort((a, b) => !b.index - !a.index || (b.score ?? -1) - (a.score ?? -1));
  return lineFigure(title, `${block.metric} on the validation split. Thick: mean over the seeds; thin: each seed.`, series, "step", `${block.metric}, %`);
}

function diagnosticsFigure(block, rows) {
  const QUANTITIES = {
    cosine: ["cosine to the task's gradient", (term) => term.cosine],
    share: ["gradient norm, as a multiple of the task's", (term, task) => (task?.grad_norm && term.grad_norm !== null ? term.grad_norm / task.grad_norm : null)],
    value: ["value of the term", (term) => term.value],
    cka: ["CKA of student and teacher features", null],
  };
  const looks = withRuns(rows).flatMap((row) => recordsOf(row).filter((record) => record.diagnostics?.points.length).map((record) => [row, record]));
  if (!looks.length) return null;
  const series = (key) => {
    const found = new Map();
    for (const [row, record] of looks) {
      const lines = {};
      for (const point of record.diagnostics.points) {
        const values = key === "cka" ? Object.entries(point.cka) : Object.entries(point.terms).filter(([name]) => !name.endsWith("/task"))
          .map(([name, term]) => [name, QUANTITIES[key][1](term, taskOf(name, point.terms))]);
        for (const [name, value] of values) if (value !== null) (lines[name] ||= []).push([point.step, value]);
      }
      for (const [name, line] of Object.entries(lines)) {
        const label = `${row.method}: ${name}`;
        if (!found.has(label)) found.set(label, { name: label, index: found.size + 1, lines: [] });
        found.get(label).lines.push(line);
      }
    }
    return [...found.values()];
  };
  const keys = Object.keys(QUANTITIES).filter((key) => series(key).length);
  if (!keys.length) return null;
  const holder = make("div", {});
  const choice = make("select", { "aria-label": "quantity of the diagnostics", onchange: () => show(choice.value) },
    keys.map((key) => make("option", { value: key }, QUANTITIES[key][0])));
  const show = (key) => {
    const made = lineFigure(QUANTITIES[key][0], "", series(key), "step", "");
    holder.replaceChildren(...[...made.children].slice(1));
  };
  show(keys[0]);
  return figure("What the terms do", "Looks of the runs at their own gradients and features. A cosine below 0 pulls against the task.", choice, holder);
}

/** The task's own entry of the group that a term belongs to; names of groups may contain slashes. */
function taskOf(name, terms) {
  const sums = Object.keys(terms).filter((other) => other.endsWith("/task") && name.startsWith(other.slice(0, -4)));
  return terms[sums.sort((a, b) => b.length - a.length)[0]];
}

/** Method by class: differences to the baseline on a colour scale, the baseline itself as it is. */
function heatFigure(block, rows) {
  const title = "By class, against the baseline";
  const shown = rows.filter((row) => row.by_class !== null);
  if (!shown.length) return "No table by class: no record of this comparison has a result by class.";
  const reach = Math.max(0.001, ...shown.filter((row) => row.role === "method").flatMap((row) => Object.values(row.by_class).map((cell) => Math.abs(cell.difference ?? 0))));
  const names = make("tr", {}, make("th", { scope: "col" }, "points"), block.classes.map((name) => make("th", { scope: "col", title: name }, make("span", {}, name))));
  const lines = shown.map((row) => make("tr", { class: row.role }, make("th", { scope: "row" }, row.method), block.classes.map((name) => {
    const { value, difference } = row.by_class[name];
    const absolute = row.role === "baseline" || difference === null;
    const cell = make("td", { title: `${row.method}, ${name}: ${percent(value)} %${absolute ? "" : `, ${points(difference)} points to the baseline`}` },
      absolute ? percent(value, 0) : number(difference, 0, 100, true));
    if (!absolute) {
      cell.style.setProperty("--strength", `${Math.round(70 * Math.min(1, Math.abs(difference) / reach))}%`);
      cell.className = difference >= 0 ? "gain" : "loss";
    }
    return cell;
  })));
  const caption = `${block.class_metric} by class: difference to the baseline in points (mean over paired seeds), blue above it and orange below it; the teacher's colours may be off the scale. Rows without colour: ${block.class_metric} in %.`;
  return dress(figure(title, caption, scroll(make("table", { class: block.classes.length > 14 ? "heat narrow" : "heat" }, make("thead", {}, names), make("tbody", {}, lines)))), { class: "wide" }, []);
}

function pictureFigure(block) {
  const title = "Predictions";
  if (!block.picture) return `No pictures: ${block.picture_note}`;
  return dress(figure(title, block.picture_note, scroll(make("img", { src: block.picture, alt: `Test images with truth and predictions: ${block.picture_note}` }))), { class: "wide" }, []);
}

/** What may be wider than the page scrolls by itself. */
function scroll(content) {
  return make("div", { class: "scroll", tabindex: "0" }, content);
}
