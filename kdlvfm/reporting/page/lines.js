// SPDX-License-Identifier: Apache-2.0
// Figures of what changes over the steps: learning curves and diagnostics, with lines to switch on and off.
"use strict";

const SHOWN_AT_FIRST = 8;

/** Lines with a legend whose entries switch them on and off. */
function lineFigure(title, caption, series, xTitle, yTitle) {
  const hidden = new Set(series.slice(SHOWN_AT_FIRST));
  const plot = make("div", { class: "plot" });
  const show = () => {
    const shown = series.filter((one) => !hidden.has(one));
    plot.replaceChildren(
      shown.length
        ? lineChart(shown, title, xTitle, yTitle)
        : make("p", { class: "absent" }, "Nothing is switched on."),
    );
  };
  const legend = make(
    "div",
    { class: "legend" },
    series.map((one) => {
      const sample = draw(
        "svg",
        { viewBox: "0 0 30 12", "aria-hidden": "true" },
        draw("line", { x1: 0, x2: 30, y1: 6, y2: 6, stroke: colour(one.index), "stroke-dasharray": dashes(one.index) }),
        marker(one.index, 15, 6),
      );
      const button = make(
        "button",
        {
          type: "button",
          "aria-pressed": String(!hidden.has(one)),
          onclick: () => {
            if (!hidden.delete(one)) hidden.add(one);
            button.setAttribute("aria-pressed", String(!hidden.has(one)));
            show();
          },
        },
        sample,
        one.name,
      );
      return button;
    }),
  );
  show();
  return figure(title, caption, plot, legend);
}

function curveFigure(block, rows) {
  const series = withRuns(rows)
    .map((row) => ({
      name: row.method,
      index: row.index,
      score: row.score,
      lines: recordsOf(row)
        .map((record) =>
          record.curve
            .map((point) => [point.step, point.metrics[block.metric_key] ?? null])
            .filter((point) => point[1] !== null)
            .map(([step, value]) => [step, 100 * value]),
        )
        .filter((line) => line.length),
    }))
    .filter((one) => one.lines.length);
  const title = "Learning curves";
  if (!series.length)
    return "No learning curves: no run of this comparison measured its validation split on the way (recipe.val_every).";
  // The baseline, whose index is 0, is always among those shown at first.
  series.sort((a, b) => !b.index - !a.index || (b.score ?? -1) - (a.score ?? -1));
  return lineFigure(
    title,
    `${block.metric} on the validation split. Thick: mean over the seeds; thin: each seed.`,
    series,
    "step",
    `${block.metric}, %`,
  );
}

function diagnosticsFigure(block, rows) {
  const QUANTITIES = {
    cosine: ["cosine to the task's gradient", (term) => term.cosine],
    share: [
      "gradient norm, as a multiple of the task's",
      (term, task) => (task?.grad_norm && term.grad_norm !== null ? term.grad_norm / task.grad_norm : null),
    ],
    value: ["value of the term", (term) => term.value],
    cka: ["CKA of student and teacher features", null],
  };
  const looks = withRuns(rows).flatMap((row) =>
    recordsOf(row)
      .filter((record) => record.diagnostics?.points.length)
      .map((record) => [row, record]),
  );
  if (!looks.length) return null;
  const series = (key) => {
    const found = new Map();
    for (const [row, record] of looks) {
      const lines = {};
      for (const point of record.diagnostics.points) {
        const values =
          key === "cka"
            ? Object.entries(point.cka)
            : Object.entries(point.terms)
                .filter(([name]) => !name.endsWith("/task"))
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
  const choice = make(
    "select",
    { "aria-label": "quantity of the diagnostics", onchange: () => show(choice.value) },
    keys.map((key) => make("option", { value: key }, QUANTITIES[key][0])),
  );
  const show = (key) => {
    const made = lineFigure(QUANTITIES[key][0], "", series(key), "step", "");
    holder.replaceChildren(...[...made.children].slice(1));
  };
  show(keys[0]);
  return figure(
    "What the terms do",
    "Looks of the runs at their own gradients and features. A cosine below 0 pulls against the task.",
    choice,
    holder,
  );
}

/** The task's own entry of the group that a term belongs to; names of groups may contain slashes. */
function taskOf(name, terms) {
  const sums = Object.keys(terms).filter((other) => other.endsWith("/task") && name.startsWith(other.slice(0, -4)));
  return terms[sums.sort((a, b) => b.length - a.length)[0]];
}
