// SPDX-License-Identifier: Apache-2.0
// The runs behind a row: command, configuration, revision, versions, files, results and diagnostics.
"use strict";

/** A list of terms and what they are; entries without content are left out. */
function facts(entries) {
  return make(
    "dl",
    {},
    Object.entries(entries)
      .filter(([, content]) => content !== null && content !== "")
      .flatMap(([term, content]) => [make("dt", {}, term), make("dd", {}, content)]),
  );
}

function describe(row, block) {
  if (row.role === "teacher") {
    const { metrics, ...card } = block.teacher_card;
    return [
      facts(
        Object.fromEntries(
          Object.entries(card).map(([key, value]) => [key, value === null ? "unknown" : String(value)]),
        ),
      ),
      metrics ? results(metrics) : null,
    ].filter(Boolean);
  }
  return row.runs.map((hash, index) => describeRun(DATA.runs[hash], block, index === 0));
}

function describeRun({ record, file, logs }, block, open) {
  const score = record.metrics[block.split]?.[block.metric_key];
  const summary = [
    `seed ${record.seed}`,
    record.status,
    score === undefined ? null : `${block.metric} ${percent(score)} %`,
    record.cost ? duration(record.cost.seconds) : null,
  ];
  const link = ({ name, href }) => make("a", { href }, name);
  return make(
    "details",
    { class: `run ${record.status}`, open },
    make("summary", {}, summary.filter(Boolean).join(" · ")),
    record.error ? make("p", { class: "error" }, record.error) : null,
    make("pre", { class: "command", title: "command" }, shell(record.command)),
    facts({
      "git revision": record.git
        ? record.git.revision + (record.git.dirty ? " with uncommitted changes" : "")
        : "unknown: not run from a checkout",
      record: link(file),
      log: logs.length ? logs.flatMap((log, at) => [at ? ", " : "", link(log)]) : "no log file lies beside the record",
      time: `${record.started} to ${record.ended || "?"}`,
      selection:
        record.selected_step === null
          ? record.selection
          : `${record.selection}, step ${record.selected_step} of ${record.steps}`,
      data: `${record.data.name}: ${Object.entries(record.data.counts)
        .map(([name, value]) => `${value} ${name}`)
        .join(", ")}; splits ${record.data.split_hash.slice(0, 12)}; licence ${record.data.licence || "unknown"}`,
      student: weights(record.student),
      teacher: record.teacher ? weights(record.teacher) : "none",
      taps: record.distiller.student_taps.length
        ? `student ${record.distiller.student_taps.join(", ")}; teacher ${record.distiller.teacher_taps.join(", ")}`
        : null,
      inference: record.inference
        ? `${size(record.inference.latency_p50, 0.001)} ms for one image, ` +
          `${size(record.inference.images_per_second, 1)} images/s in batches of ${record.inference.batch_size}, ` +
          `${record.inference.device}, threads: ${record.inference.threads}`
        : null,
      "distiller's parameters": record.distiller.parameters ? number(record.distiller.parameters, 0) : null,
      machine: [record.hardware.gpu, record.hardware.cpu, `${record.hardware.cores} cores`, record.hardware.platform]
        .filter(Boolean)
        .join(", "),
      versions: Object.entries(record.versions)
        .map(([name, version]) => `${name} ${version}`)
        .join(", "),
      "hash of the configuration": record.config_hash,
    }),
    Object.keys(record.metrics).length ? results(record.metrics) : null,
    diagnosticsTable(record),
    make("details", {}, make("summary", {}, "configuration"), make("pre", {}, JSON.stringify(record.config, null, 2))),
  );
}

function weights(card) {
  const origin =
    (card.source ? ` from ${card.source}` : "") + (card.sha256 ? `, sha256 ${card.sha256.slice(0, 12)}` : "");
  return `${card.name}, ${card.weights} weights${origin}; licence ${card.licence || "unknown"}`;
}

function results(metrics) {
  const splits = Object.keys(metrics);
  const names = [
    ...new Set(
      splits.flatMap((split) => Object.keys(metrics[split]).filter((name) => typeof metrics[split][name] === "number")),
    ),
  ];
  return make(
    "table",
    { class: "small" },
    make("caption", {}, "results, %"),
    make(
      "thead",
      {},
      make(
        "tr",
        {},
        make("th", { scope: "col" }, "split"),
        names.map((name) => make("th", { scope: "col" }, name)),
      ),
    ),
    make(
      "tbody",
      {},
      splits.map((split) =>
        make(
          "tr",
          {},
          make("th", { scope: "row" }, split),
          names.map((name) => make("td", {}, percent(metrics[split][name], 2))),
        ),
      ),
    ),
  );
}

function diagnosticsTable(record) {
  const looks = record.diagnostics?.points || [];
  if (!looks.length) return null;
  const { step, terms, cka } = looks.at(-1);
  const digits = (value) => number(value, 3);
  const lines = Object.entries(terms).map(([name, term]) => {
    const task = taskOf(name, terms);
    const share =
      term !== task && task?.grad_norm && term.grad_norm !== null
        ? `${percent(term.grad_norm / task.grad_norm)} %`
        : NOTHING;
    return make(
      "tr",
      {},
      make("th", { scope: "row" }, name),
      [digits(term.value), digits(term.grad_norm), share, digits(term.cosine)].map((text) => make("td", {}, text)),
    );
  });
  const pairs = Object.entries(cka).map(([pair, value]) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, `CKA ${pair}`),
      make("td", {}, digits(value)),
      make("td", { colspan: 3 }, `${digits(looks[0].cka[pair])} at step ${looks[0].step}`),
    ),
  );
  return make(
    "table",
    { class: "small" },
    make("caption", {}, `diagnostics at step ${step}`),
    make(
      "thead",
      {},
      make(
        "tr",
        {},
        ["term", "value", "gradient norm", "of the task's", "cosine to the task"].map((name) =>
          make("th", { scope: "col" }, name),
        ),
      ),
    ),
    make("tbody", {}, lines, pairs),
  );
}
