// SPDX-License-Identifier: Apache-2.0
// The page: comparisons with their tables, which sort and filter, and the runs behind each row.
"use strict";

const DATA = JSON.parse(document.getElementById("data").textContent);

/** One comparison: heading, table, figures. `refresh` applies the filter. */
class Comparison {
  constructor(block, number) {
    this.block = block;
    this.sorted = null;
    this.columns = columnsOf(block);
    this.lines = new Map(block.rows.map((row) => [row, new Line(row, block, `${number}-${block.rows.indexOf(row)}`)]));
    this.body = make("tbody", {});
    this.figures = make("div", { class: "figures" });
    this.absent = make("ul", { class: "remarks" });
    this.heads = this.columns.map((column) => this.head(column));
    const remarks = [
      ...block.warnings.map((text) => make("li", { class: "warning" }, `⚠ ${text}`)),
      ...block.notes.map((text) => make("li", {}, text)),
    ];
    this.element = make(
      "section",
      { id: `comparison-${number}` },
      make("h2", {}, block.title, make("span", { class: "student" }, block.network)),
      block.details.map((text) => make("p", { class: "details" }, text)),
      scroll(make("table", { class: "results" }, make("thead", {}, make("tr", {}, this.heads)), this.body)),
      remarks.length ? make("ul", { class: "remarks" }, remarks) : null,
      this.figures,
      this.absent,
    );
  }

  head(column) {
    const sort = make(
      "button",
      { type: "button", onclick: () => this.sort(column) },
      column.title || this.block.metric,
      make("span", { class: "arrow", "aria-hidden": "true" }),
    );
    return make("th", { scope: "col", "aria-sort": "none" }, sort, make("small", {}, column.unit));
  }

  /** Numbers start with the largest, names with the first; unknown values stay at the end. */
  sort(column) {
    const descending = this.sorted?.column === column ? !this.sorted.descending : column !== COLUMNS[0];
    this.sorted = { column, descending };
    this.heads.forEach((head, index) =>
      head.setAttribute("aria-sort", this.columns[index] !== column ? "none" : descending ? "descending" : "ascending"),
    );
    this.arrange();
  }

  arrange() {
    const rows = [...this.block.rows];
    if (this.sorted) {
      const { column, descending } = this.sorted;
      const compare = (a, b) => {
        const [x, y] = [column.value(a), column.value(b)];
        if (x === null || y === null) return (x === null) - (y === null);
        const order = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
        return descending ? -order : order;
      };
      // Teacher and baseline stay on top: they are what the methods are measured by.
      rows.sort((a, b) => (b.role !== "method") - (a.role !== "method") || (a.role === "method" ? compare(a, b) : 0));
    }
    this.body.replaceChildren(...rows.flatMap((row) => this.lines.get(row).elements));
  }

  /** Show the methods that `accept` takes; the number of those shown. */
  refresh(accept) {
    const rows = this.block.rows.filter((row) => row.role !== "method" || accept(row, this.block));
    for (const [row, line] of this.lines) line.show(rows.includes(row));
    const figures = [gapFigure, costFigure, curveFigure, diagnosticsFigure, heatFigure, pictureFigure]
      .map((make) => make(this.block, rows))
      .filter((one) => one !== null);
    this.figures.replaceChildren(...figures.filter((one) => typeof one !== "string"));
    this.absent.replaceChildren(
      ...figures.filter((one) => typeof one === "string").map((text) => make("li", {}, text)),
    );
    return rows.filter((row) => row.role === "method").length;
  }
}

/** A row of the table and, once it is opened, the runs behind it. */
class Line {
  constructor(row, block, id) {
    this.row = row;
    this.block = block;
    this.button = make(
      "button",
      { type: "button", "aria-expanded": "false", "aria-controls": `runs-${id}` },
      row.method,
    );
    const columns = columnsOf(block);
    const cells = columns.slice(1).map((column) =>
      column.title === "verdict" ? verdictCell(row) : make("td", {}, column.text(row)),
    );
    this.line = make(
      "tr",
      { class: `${row.role} row`, onclick: () => this.toggle() },
      make("th", { scope: "row" }, this.button),
      cells,
    );
    this.runs = make("tr", { class: "runs", id: `runs-${id}`, hidden: true }, make("td", { colspan: columns.length }));
    this.elements = [this.line, this.runs];
  }

  toggle() {
    const open = this.runs.hidden;
    if (open && !this.runs.firstChild.childNodes.length) this.runs.firstChild.append(...describe(this.row, this.block));
    this.runs.hidden = !open;
    this.button.setAttribute("aria-expanded", String(open));
  }

  show(shown) {
    this.line.hidden = !shown;
    this.runs.hidden = !shown || this.button.getAttribute("aria-expanded") !== "true";
  }
}

function overview() {
  const names = [...new Set(DATA.blocks.flatMap((block) => block.rows.map((row) => row.method)))];
  const order = (name) => ["teacher", "baseline"].indexOf(name) >>> 0;
  names.sort((a, b) => order(a) - order(b) || a.localeCompare(b));
  const head = DATA.blocks.map((block, index) =>
    make(
      "th",
      { scope: "col" },
      make("small", {}, `${block.title}, ${block.metric}`),
      make("a", { href: `#comparison-${index}` }, block.network),
      make("small", {}, `from ${block.teacher || "no teacher"}`),
    ),
  );
  const cell = (row) =>
    !row
      ? NOTHING
      : [
          COLUMNS[1].text(row),
          row.role === "method" && row.difference !== null
            ? make(
                "span",
                { class: `aside ${(row.verdict || "none").replace(" ", "-")}` },
                `${points(row.difference)} ${row.verdict ? VERDICTS[row.verdict][0] : ""}`,
              )
            : null,
        ];
  const lines = names.map((name) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, name),
      DATA.blocks.map((block) => make("td", {}, cell(block.rows.find((row) => row.method === name)))),
    ),
  );
  return make(
    "section",
    {},
    make("h2", {}, "Overview"),
    make(
      "p",
      { class: "details" },
      "Scores in %, beside them the difference to the baseline of the same column in points. " +
        "Columns do not compare with each other.",
    ),
    scroll(
      make(
        "table",
        { class: "overview" },
        make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "method"), head)),
        make("tbody", {}, lines),
      ),
    ),
  );
}

function start() {
  const comparisons = DATA.blocks.map((block, index) => new Comparison(block, index));
  const text = make("input", {
    type: "search",
    id: "filter",
    placeholder: "method, setting, student, data, revision …",
    oninput: () => filter(),
  });
  const wanted = make(
    "select",
    { id: "verdict", onchange: () => filter() },
    make("option", { value: "" }, "all"),
    Object.entries(VERDICTS).map(([name, [sign]]) =>
      make("option", { value: name }, `${sign} ${name === "none" ? "no verdict" : name}`),
    ),
  );
  const count = make("output", { for: "filter verdict" });
  const total = DATA.blocks.reduce((sum, block) => sum + block.rows.filter((row) => row.role === "method").length, 0);
  const filter = () => {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const accept = (row, block) =>
      (!wanted.value || (row.verdict || "none") === wanted.value) &&
      words.every((word) =>
        `${row.search} ${block.title} ${block.student} ${block.teacher}`.toLowerCase().includes(word),
      );
    const shown = comparisons.reduce((sum, comparison) => sum + comparison.refresh(accept), 0);
    count.textContent = `${shown} of ${total} methods`;
  };
  document
    .getElementById("tools")
    .append(
      make("label", {}, "Filter ", text),
      make("label", {}, "Verdict ", wanted),
      count,
      make("span", { class: "hint" }, "A click on a row, or Enter, opens its runs."),
    );
  document
    .getElementById("content")
    .append(...(comparisons.length > 1 ? [overview()] : []), ...comparisons.map((one) => one.element));
  for (const comparison of comparisons) comparison.arrange();
  filter();
}

start();
