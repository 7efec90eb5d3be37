"use strict";
// The interactive figures of a part's `examples`: 3-D magnitudes and the text. They replace the still figures once
// they are ready. Without scripts, DecompressionStream or WebGL the still figures stay.

const make = (tag, properties = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
};
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const bytesOf = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
const short = (x) => (x >= 1e5 || (x > 0 && x < 1e-3) ? x.toExponential(1) : String(Number(x.toPrecision(3))));
const percent = (x) => `${short(100 * x)}%`;

function unpacked(matrix) { // bfloat16 in base64 -> rows of numbers
  const words = new Uint16Array(bytesOf(matrix.base64).buffer);
  const flat = Array.from(new Float32Array(Uint32Array.from(words, (w) => w << 16).buffer));
  const columns = Number(matrix.shape.split(" ").at(-1));
  return Array.from({ length: flat.length / columns }, (_, i) => flat.slice(i * columns, (i + 1) * columns));
}

function selector(text, entries, change) { // entries: [[group or "", label], ...]
  const select = make("select");
  let last = "", parent = select;
  entries.forEach(([group, label], i) => {
    if (group !== last) parent = group ? select.appendChild(make("optgroup", { label: group })) : select;
    last = group;
    parent.append(make("option", { value: i, textContent: label }));
  });
  select.addEventListener("change", change);
  return [select, make("label", {}, `${text} `, select)];
}

// ------------------------------------------------------------------------------------------------------------ text

function viewsOf(data, sequence) { // how to colour tokens: [{group, label, color, values, fraction, ends, words}]
  const relative = unpacked(sequence.relative), alpha = unpacked(sequence.alpha), share = unpacked(sequence.share)[0];
  const largest = Math.max(...share, 1e-9);
  const layers = data.layers.map((name, i) => ({
    group: "magnitude after", label: name, color: "--spike", values: relative[i],
    fraction: (x) => Math.log10(Math.max(x, 1)) / 3, ends: ["1 x median", "1000 x"],
    words: (x) => `${short(x)} x the median after ${name}`,
  }));
  const overall = {
    group: "attention received", label: "share over all heads", color: "--sink", values: share,
    fraction: (x) => x / largest, ends: ["0", percent(largest)], words: (x) => `${percent(x)} of all attention`,
  };
  const heads = data.heads.map((name, i) => ({
    group: "attention received", label: `in head ${name}`, color: "--sink", values: alpha[i], head: true,
    fraction: (x) => x, ends: ["0", "100%"],
    words: (x) => `${percent(x)} of the attention of its queries in head ${name}`,
  }));
  return [...layers, overall, ...heads];
}

function textFigure(figure, data) {
  const text = make("div", { className: "text" });
  text.setAttribute("role", "group");
  text.setAttribute("aria-label", "The text, token by token: arrow keys move, the line below shows the numbers");
  const line = make("p", { className: "told" });
  line.setAttribute("aria-live", "polite");
  const legend = make("div", { className: "legend" });
  let views = viewsOf(data, data.sequences[0]), chosen = -1;

  const tell = (t) => {
    chosen = t;
    [...text.children].forEach((span, i) => span.classList.toggle("chosen", i === t));
    const sequence = data.sequences[sequences.value], view = views[colours.value], token = sequence.texts[t];
    const peak = views.filter((v) => v.color === "--spike").reduce((a, b) => (b.values[t] > a.values[t] ? b : a));
    const heads = views.filter((v) => v.head);
    const best = heads.reduce((a, b) => (b.values[t] > a.values[t] ? b : a));
    line.replaceChildren(
      make("strong", { textContent: token }),
      ` at position ${t} (id ${sequence.ids[t]}): ${view.words(view.values[t])}. At most ` +
      `${peak.words(peak.values[t])}. It gets ` +
      `${percent(views.find((v) => v.label.startsWith("share")).values[t])} of all attention, most ${best.label}: ` +
      `${percent(best.values[t])} of the attention of its queries. It is ${sequence.spikes[t] ? "a" : "no"} spike` +
      (sequence.enough_queries[t] ? `, and a sink in ${sequence.sink_heads[t]} of ${data.n_heads} heads.`
        : ". Fewer than T/4 queries see it, so it does not count as a sink."));
  };
  const show = () => {
    const sequence = data.sequences[sequences.value], view = views[colours.value];
    const isSink = (t) => sequence.enough_queries[t] &&
      (view.head ? view.values[t] > data.epsilon : sequence.sink_heads[t] > 0);
    text.replaceChildren(...sequence.texts.map((token, t) => {
      const strength = Math.round(60 * Math.min(1, Math.max(0, view.fraction(view.values[t]))));
      const span = make("span", { textContent: token, tabIndex: t ? -1 : 0 });
      span.style.background = `color-mix(in srgb, var(${view.color}) ${strength}%, transparent)`;
      span.classList.toggle("spike", Boolean(sequence.spikes[t]));
      span.classList.toggle("sink", Boolean(isSink(t)));
      span.dataset.t = t;
      return span;
    }));
    const n = sequence.texts.length;
    if (sequence.length > n) text.append(` … (${n} of ${sequence.length} tokens)`);
    const bar = make("i");
    bar.style.background = `linear-gradient(90deg, transparent, color-mix(in srgb, var(${view.color}) 60%, transparent))`;
    legend.replaceChildren(
      make("span", {}, view.ends[0], bar, view.ends[1]),
      make("span", {}, make("b", { className: "spike", textContent: "token" }), " a spike"),
      make("span", {}, make("b", { className: "sink", textContent: "token" }),
        view.head ? ` sink in this head, above ${percent(data.epsilon)}` : ` sink in at least one head`));
    if (chosen >= 0 && chosen < sequence.texts.length) tell(chosen);
    else line.textContent = "Tap a token or point at it to see its numbers.";
  };
  const [sequences, sequenceLabel] = selector("sequence",
    data.sequences.map((s) => ["", `${s.sequence + 1} (loss ${s.loss.toFixed(2)})`]),
    () => { views = viewsOf(data, data.sequences[sequences.value]); chosen = -1; show(); });
  const [colours, colourLabel] = selector("colour by", views.map((v) => [v.group, v.label]), show);
  colours.value = data.best_layer;
  for (const event of ["pointerover", "focusin", "click"]) {
    text.addEventListener(event, (e) => { if (e.target.dataset.t) tell(Number(e.target.dataset.t)); });
  }
  text.addEventListener("keydown", (e) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[e.key];
    const next = step && e.target.dataset.t && text.children[Number(e.target.dataset.t) + step];
    if (next) { e.preventDefault(); next.focus(); }
  });
  const labels = data.sequences.length > 1 ? [sequenceLabel, colourLabel] : [colourLabel];
  figure.querySelector(".still").replaceWith(
    make("div", { className: "live" }, make("div", { className: "controls" }, ...labels), legend, text, line));
  figure.querySelector("figcaption").textContent = figure.dataset.caption;
  show();
}

// ------------------------------------------------------------------------------------------------------ magnitudes

let library;
const plotly = () => (library ??= (async () => { // inflated once, when it is first needed
  const packed = new Blob([bytesOf(document.getElementById("plotly").textContent)]);
  const source = await new Response(packed.stream().pipeThrough(new DecompressionStream("gzip"))).text();
  document.head.append(make("script", { textContent: source }));
  return window.Plotly;
})());

function surface(data, matrix, width) { // what plotly needs to show one layer
  const far = Math.max(1, 430 / (width || 430)); // a narrow plot is seen from farther away, so that its labels fit
  const values = unpacked(matrix.values), starts = matrix.starts.split(" ").map(Number);
  const ratio = (x) => x / Math.max(matrix.median, 1e-30), texts = data.sequences[0].texts;
  const channels = starts.map((start, i) => {
    const last = (starts[i + 1] ?? matrix.n_channels) - 1;
    return last > start ? `channels ${start}–${last}, largest` : `channel ${start}`;
  });
  const hovers = values.map((row, t) => row.map((x, i) =>
    `${(texts[t] ?? "").replace(/&/g, "&amp;").replace(/</g, "&lt;")} at position ${t}<br>${channels[i]}<br>|h| ${short(x)} = ${short(ratio(x))} x the median`));
  const [ink, line] = [colour("--ink"), colour("--line")];
  const axis = (title) => ({ title: { text: title }, color: ink, gridcolor: line, zerolinecolor: line, showspikes: false });
  return [[{
    type: "surface", x: starts, y: values.map((_, t) => t), z: values, text: hovers, hoverinfo: "text",
    surfacecolor: values.map((row) => row.map((x) => Math.log10(Math.max(ratio(x), 1)))), cmin: 0, cmax: 2.5,
    colorscale: [[0, line], [1, colour("--spike")]], showscale: false, lighting: { ambient: 0.8, diffuse: 0.4 },
  }], {
    margin: { l: 0, r: 0, t: 0, b: 0 }, paper_bgcolor: "rgba(0,0,0,0)", uirevision: "kept", font: { color: ink },
    scene: {
      xaxis: axis("channel"), yaxis: { ...axis("position"), autorange: "reversed" }, zaxis: axis("|h|"),
      aspectmode: "manual", aspectratio: { x: 1.3, y: 1, z: 0.75 }, camera: { eye: { x: 1.4 * far, y: -1.95 * far, z: 0.85 * far }, center: { x: 0, y: 0, z: -0.15 } },
    },
  }];
}

async function magnitudeFigure(figure, data) {
  const canvas = make("canvas");
  if (!(canvas.getContext("webgl2") || canvas.getContext("webgl")) || !window.DecompressionStream) return;
  const Plotly = await plotly();
  const plot = make("div", { className: "plot" });
  const show = () => Plotly.react(plot, ...surface(data, data.matrices[select.value], plot.clientWidth), {
    displaylogo: false, responsive: true, scrollZoom: false, modeBarButtons: [["resetCameraDefault3d"]],
  });
  const [select, label] = selector("after", data.matrices.map((m) => ["", m.layer]), show);
  select.value = data.best_matrix;
  figure.querySelector(".still").replaceWith(
    make("div", { className: "live" }, make("div", { className: "controls" }, label), plot));
  figure.querySelector("figcaption").textContent = figure.dataset.caption;
  await show();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
}

// ------------------------------------------------------------------------------------------------------------ start

const LIVE = { text: textFigure, matrix: magnitudeFigure };
const near = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries.filter((entry) => entry.isIntersecting)) {
    near.unobserve(target);
    LIVE[target.dataset.live](target, JSON.parse(document.getElementById(target.dataset.of).textContent));
  }
}, { rootMargin: "600px" });
document.querySelectorAll("figure[data-live]").forEach((figure) => near.observe(figure));
