// SPDX-License-Identifier: Apache-2.0
// The charts, as SVG. Colour never stands alone: lines differ in dashes and markers, verdicts in their signs.
"use strict";

const VERDICTS = {
  better: ["▲", "better than the baseline"],
  worse: ["▼", "worse than the baseline"],
  "not shown": ["○", "no difference shown"],
  none: ["·", "no verdict (fewer than 3 paired seeds)"],
};
const MARKERS = [
  (x, y) => draw("circle", { cx: x, cy: y, r: 4.2 }),
  (x, y) => draw("rect", { x: x - 3.8, y: y - 3.8, width: 7.6, height: 7.6 }),
  (x, y) => draw("path", { d: `M${x} ${y - 5.2}l5 8.6h-10z` }),
  (x, y) => draw("path", { d: `M${x} ${y - 5.6}l5.6 5.6l-5.6 5.6l-5.6-5.6z` }),
  (x, y) => draw("path", { d: `M${x} ${y + 5.2}l5-8.6h-10z` }),
  (x, y) => draw("path", { d: `M${x - 1.6} ${y - 5}h3.2v3.4h3.4v3.2h-3.4v3.4h-3.2v-3.4h-3.4v-3.2h3.4z` }),
];
const COLOURS = 7;
const DASHES = ["", "7 3", "2 3"];

const colour = (index) => `var(--series-${index % COLOURS})`;
const dashes = (index) => DASHES[Math.floor(index / COLOURS) % DASHES.length] || null;

function marker(index, x, y, hollow = false) {
  const shape = MARKERS[index % MARKERS.length](x, y);
  return dress(shape, { class: hollow ? "hollow" : null, fill: colour(index), stroke: colour(index) }, []);
}

function canvas(width, height, title) {
  return draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title, class: "chart" });
}

/** Axes of a chart with room for labels; gives the functions from values to places. */
function axes(svg, box, xTicks, yTicks, xTitle, yTitle) {
  const { left, right, top, bottom } = box;
  const x = (value) => left + ((value - xTicks[0]) / (xTicks.at(-1) - xTicks[0])) * (right - left);
  const y = (value) => bottom - ((value - yTicks[0]) / (yTicks.at(-1) - yTicks[0])) * (bottom - top);
  const yLabels = tickLabels(yTicks);
  yTicks.forEach((value, index) => {
    svg.append(draw("line", { class: "grid", x1: left, x2: right, y1: y(value), y2: y(value) }));
    svg.append(draw("text", { x: left - 8, y: y(value) + 4, "text-anchor": "end" }, yLabels[index]));
  });
  tickLabels(xTicks).forEach((label, index) => {
    const place = x(xTicks[index]);
    svg.append(draw("line", { class: "tick", x1: place, x2: place, y1: bottom, y2: bottom + 5 }));
    svg.append(draw("text", { x: place, y: bottom + 19, "text-anchor": "middle" }, label));
  });
  svg.append(
    draw("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
    draw("text", { class: "title", x: (left + right) / 2, y: bottom + 38, "text-anchor": "middle" }, xTitle),
    draw("text", { class: "title", x: left - 8, y: top - 12, "text-anchor": "start" }, yTitle),
  );
  return { x, y };
}

/** Lines over steps. Each series has `name`, `index` and `lines`, [x, y] lists of its seeds; thick is their mean. */
function lineChart(series, title, xTitle, yTitle) {
  const svg = canvas(560, 310, title);
  const all = series.flatMap((one) => one.lines.flat());
  const [xs, ys] = [all.map((point) => point[0]), all.map((point) => point[1])];
  const xTicks = ticks(Math.min(0, ...xs), Math.max(1, ...xs));
  const { x, y } = axes(
    svg,
    { left: 52, right: 545, top: 30, bottom: 262 },
    xTicks,
    ticks(Math.min(...ys), Math.max(...ys)),
    xTitle,
    yTitle,
  );
  const path = (line) => line.map(([a, b], at) => `${at ? "L" : "M"}${x(a).toFixed(1)} ${y(b).toFixed(1)}`).join("");
  for (const { name, index, lines } of series) {
    const group = draw("g", { class: "series" }, draw("title", {}, name));
    const stroke = { stroke: colour(index), "stroke-dasharray": dashes(index) };
    if (lines.length > 1)
      for (const line of lines) group.append(draw("path", { class: "seed", d: path(line), ...stroke }));
    const steps = [...new Set(lines.flat().map((point) => point[0]))].sort((a, b) => a - b);
    const middle = steps.map((step) => [
      step,
      mean(
        lines
          .flat()
          .filter((p) => p[0] === step)
          .map((p) => p[1]),
      ),
    ]);
    group.append(draw("path", { class: "mean", d: path(middle), ...stroke }));
    const every = Math.ceil(middle.length / 12);
    middle.forEach(([a, b], at) =>
      at % every && at < middle.length - 1 ? null : group.append(marker(index, x(a), y(b))),
    );
    svg.append(group);
  }
  return svg;
}

/** What an interval's end looks like: a stroke across, or an arrow where it goes on beyond the figure. */
const whiskerEnd = (place, middle, cut, way) =>
  cut ? `M${place - 6 * way} ${middle - 5}l${6 * way} 5l${-6 * way} 5` : `M${place} ${middle - 5}v10`;

/** Bars with 95 % intervals. Each has `name`, `value`, `low`, `high`, `verdict`, `why`; marks are [value, text]. */
function barChart(bars, title, xTitle, marks, unit) {
  const left = 24 + Math.min(230, 7.2 * Math.max(8, ...bars.map((bar) => bar.name.length)));
  const [width, line, top] = [Math.max(560, left + 360), 27, 34];
  const bottom = top + line * bars.length + 6;
  const svg = canvas(width, bottom + 46, title);
  // Two seeds can give intervals a hundred times as wide as all bars together, which would be lines beside them.
  const core = [...bars.map((bar) => bar.value).filter((value) => value !== null), ...marks.map((mark) => mark[0]), 0];
  const [least, most] = [Math.min(...core), Math.max(...core)];
  const known = (value, other) => (value === null ? other : value);
  const lowest = Math.min(least, ...bars.map((bar) => known(bar.low, least)));
  const highest = Math.max(most, ...bars.map((bar) => known(bar.high, most)));
  const span = most - least || Infinity;
  const xTicks = ticks(Math.max(lowest, least - span), Math.min(highest, most + span), 6);
  const right = width - 96;
  const x = (value) => left + ((value - xTicks[0]) / (xTicks.at(-1) - xTicks[0])) * (right - left);
  tickLabels(xTicks).forEach((label, index) => {
    const place = x(xTicks[index]);
    svg.append(draw("line", { class: "grid", x1: place, x2: place, y1: top, y2: bottom }));
    svg.append(draw("text", { x: place, y: bottom + 17, "text-anchor": "middle" }, label));
  });
  svg.append(draw("text", { class: "title", x: (left + right) / 2, y: bottom + 37, "text-anchor": "middle" }, xTitle));
  for (const [value, text] of marks) {
    svg.append(draw("line", { class: "mark", x1: x(value), x2: x(value), y1: top - 6, y2: bottom }));
    svg.append(draw("text", { class: "title", x: x(value), y: top - 12, "text-anchor": "middle" }, text));
  }
  bars.forEach((bar, index) => {
    const middle = top + line * (index + 0.5) + 3;
    const short = bar.name.length > 32 ? `${bar.name.slice(0, 31)}…` : bar.name;
    const [sign, words] = VERDICTS[bar.verdict || "none"];
    const label = draw("text", { class: "name", x: left - 24, y: middle + 4, "text-anchor": "end" }, short);
    const group = draw(
      "g",
      { class: `bar ${(bar.verdict || "none").replace(" ", "-")}` },
      draw("title", {}, `${bar.name}: ${words}`),
      label,
    );
    group.append(draw("text", { class: "sign", x: left - 12, y: middle + 4, "text-anchor": "middle" }, sign));
    if (bar.value === null) {
      group.append(draw("text", { class: "none", x: left + 6, y: middle + 4 }, bar.why));
    } else {
      const [from, to] = [x(Math.min(0, bar.value)), x(Math.max(0, bar.value))];
      group.append(draw("rect", { x: from, y: middle - 8, width: Math.max(1, to - from), height: 16, rx: 2 }));
      if (bar.low !== null) {
        const cut = [bar.low < xTicks[0], bar.high > xTicks.at(-1)];
        const [low, high] = [cut[0] ? left : x(bar.low), cut[1] ? right : x(bar.high)];
        const ends = whiskerEnd(low, middle, cut[0], -1) + whiskerEnd(high, middle, cut[1], 1);
        group.append(draw("path", { class: "whisker", d: `M${low} ${middle}H${high}${ends}` }));
      }
      const end = Math.max(to, bar.high === null ? 0 : Math.min(right, x(bar.high)));
      group.append(
        draw(
          "text",
          { class: "value", x: end + 7, y: middle + 4 },
          number(bar.value, unit === "%" ? 0 : 1, 1, unit !== "%") + (unit === "%" ? " %" : ""),
        ),
      );
    }
    svg.append(group);
  });
  return svg;
}

/** Points with `name`, `index`, `x`, `y`, `std`, `other` (of another comparison); levels are [value, text]. */
function scatterChart(dots, title, xTitle, yTitle, levels) {
  const svg = canvas(560, 330, title);
  const reach = [
    ...dots.flatMap((dot) => [dot.y - (dot.std || 0), dot.y + (dot.std || 0)]),
    ...levels.map((level) => level[0]),
  ];
  const xs = dots.map((dot) => dot.x);
  const pad = (Math.max(...xs) - Math.min(...xs)) * 0.08 || Math.abs(xs[0]) * 0.1 || 1;
  const xTicks = ticks(Math.max(0, Math.min(...xs) - pad), Math.max(...xs) + pad);
  const { x, y } = axes(
    svg,
    { left: 52, right: 545, top: 30, bottom: 282 },
    xTicks,
    ticks(Math.min(...reach), Math.max(...reach)),
    xTitle,
    yTitle,
  );
  for (const [value, text] of levels) {
    svg.append(draw("line", { class: "mark", x1: 52, x2: 545, y1: y(value), y2: y(value) }));
    svg.append(draw("text", { class: "title", x: 543, y: y(value) - 5, "text-anchor": "end" }, text));
  }
  const taken = [];
  for (const dot of [...dots].sort((a, b) => b.y - a.y)) {
    const [a, b] = [x(dot.x), y(dot.y)];
    const group = draw(
      "g",
      { class: dot.other ? "dot other" : "dot" },
      draw("title", {}, `${dot.name}: ${number(dot.y)}, ${number(dot.x, 3)}`),
    );
    if (dot.std)
      group.append(draw("path", { class: "whisker", d: `M${a} ${y(dot.y - dot.std)}V${y(dot.y + dot.std)}` }));
    group.append(marker(dot.index, a, b, dot.other));
    const place = dot.other ? undefined : freePlace(taken, a, b, 6.4 * dot.name.length);
    if (place) group.append(draw("text", { x: place.x, y: place.y, "text-anchor": place.anchor }, dot.name));
    svg.append(group);
  }
  return svg;
}

/** Where a label of this width lies beside a point without covering another; none if there is no such place. */
function freePlace(taken, a, b, width) {
  for (const shift of [4, 12, -4, 20]) {
    for (const right of [true, false]) {
      const [from, y] = [right ? a + 10 : a - 10 - width, b + shift];
      const covers = ([start, end, height]) => start < from + width && end > from && Math.abs(height - y) < 12;
      if (from < 52 || from + width > 555 || y > 280 || taken.some(covers)) continue;
      taken.push([from, from + width, y]);
      return { x: right ? a + 10 : a - 10, y, anchor: right ? "start" : "end" };
    }
  }
}
