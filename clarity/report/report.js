"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const names = data.names, labels = data.labels, K = names.length, tile = data.tile, several = data.audits.length > 1;
const field = Object.fromEntries(data.fields.map((name, i) => [name, i]));
const $ = (id) => document.getElementById(id);
const root = document.documentElement, isDark = () => root.dataset.theme === "dark";

// -- making elements: text never becomes markup ----------------------------------------------------------------------
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, run] of Object.entries(value)) node.addEventListener(event, run);
    else if (value !== null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child !== null));
  return node;
}
const arrow = (s, t) => `${data.full_names[s]} → ${data.full_names[t]}`;
// A label that the model does not know contradicts nothing.
const isContradicted = (image) => image.label !== null && image.source !== null && image.label !== image.source;

// -- pictures: cut out of sheets that are decoded when one of their pictures is first wanted ------------------------------
const sheetTexts = [...document.querySelectorAll("script.sheet")].map((node) => node.textContent);
const sheets = new Map(), each = tile.columns * tile.rows;
function sheet(i) {
  if (!sheets.has(i)) sheets.set(i, new Promise((resolve, reject) => {
    const image = new Image();
    image.onload = () => resolve(image);
    image.onerror = () => reject(new Error("sheet " + i));
    image.src = sheetTexts[i];
  }));
  return sheets.get(i);
}
async function paint(canvas, index) {
  const image = await sheet(Math.floor(index / each));
  const within = index % each;
  canvas.getContext("2d", { willReadFrequently: true }).drawImage(image,
    (within % tile.columns) * tile.width, Math.floor(within / tile.columns) * tile.height,
    tile.width, tile.height, 0, 0, tile.width, tile.height);
}
const sized = (width) => `width: ${Math.round(width)}px; height: ${Math.round(width * tile.height / tile.width)}px`;
const blank = (width, alt) => el("canvas", { class: "tile" + (tile.width < 60 ? " exact" : ""), style: sized(width), width: tile.width, height: tile.height, role: "img", "aria-label": alt, title: alt });
const missing = (width, alt, text) => el("span", { class: "nopic", style: sized(width), role: "img", "aria-label": alt + ": " + text }, text);
function picture(index, size, alt) {
  if (index < 0) return missing(size, alt, "not stored");
  const canvas = blank(size, alt);
  paint(canvas, index);
  return canvas;
}

// Differences: blue taken away, orange added; none is the page's own ground, so both themes read alike.
const signedOnPage = new Set();
function ends() {
  return isDark()
    ? [[86, 180, 255], [20, 23, 28], [255, 150, 60]] : [[16, 84, 150], [246, 246, 243], [196, 78, 0]];
}
function colour(pixels, values, gain) {
  const [low, zero, high] = ends();
  for (let i = 0; i < values.length; i++) {
    const v = Math.max(-1, Math.min(1, values[i] * gain)), end = v < 0 ? low : high, a = Math.abs(v);
    for (let c = 0; c < 3; c++) pixels[4 * i + c] = zero[c] + a * (end[c] - zero[c]);
    pixels[4 * i + 3] = 255;
  }
}
async function grey(index) {
  const canvas = document.createElement("canvas");
  canvas.width = tile.width; canvas.height = tile.height;
  await paint(canvas, index);
  const pixels = canvas.getContext("2d").getImageData(0, 0, tile.width, tile.height).data;
  const values = new Float32Array(pixels.length / 4);
  for (let i = 0; i < values.length; i++) values[i] = (pixels[4 * i] + pixels[4 * i + 1] + pixels[4 * i + 2]) / 765;
  return values;
}
function signed(size, alt, gain, load) {
  const canvas = blank(size, alt);
  canvas.repaint = async () => {
    const values = await load(), context = canvas.getContext("2d");
    const pixels = context.createImageData(tile.width, tile.height);
    colour(pixels.data, values, gain);
    context.putImageData(pixels, 0, 0);
  };
  canvas.repaint();
  signedOnPage.add(canvas);
  return canvas;
}
function difference(from, to, size, alt) {
  if (from < 0 || to < 0) return missing(size, alt, "not stored");
  return signed(size, alt, 1.25, async () => {
    const [a, b] = await Promise.all([grey(from), grey(to)]);
    return b.map((value, i) => value - a[i]);
  });
}
const meanChange = (index, size, alt) => index < 0 ? missing(size, alt, "–")
  : signed(size, alt, 2, async () => (await grey(index)).map((value) => 2 * value - 1));

// -- light and dark -----------------------------------------------------------------------------------------------------
function retheme(theme) {
  root.dataset.theme = theme;
  for (const canvas of signedOnPage) canvas.isConnected ? canvas.repaint() : signedOnPage.delete(canvas);
  const [low, zero, high] = ends().map((rgb) => `rgb(${rgb.join(" ")})`);
  drawMaps();
  for (const [name, value] of [["--d0", low], ["--d1", zero], ["--d2", high]]) root.style.setProperty(name, value);
}
$("theme").addEventListener("click", () => {
  const theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("clarity-theme", theme); } catch (error) { /* a page from a disk may have no storage */ }
  retheme(theme);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", (event) => retheme(event.matches ? "dark" : "light"));

// -- maps ---------------------------------------------------------------------------------------------------------------
const choices = [...data.maps];
if (data.audits.some((audit) => audit.change)) choices.push({ key: "change", title: "Mean change", unit: "", doc: "what counterfactuals of this class pair add and remove on average" });
let metric = choices.find((map) => map.key === "median_distance"), cursor = null, chosen = null;

const mapOf = Object.fromEntries(data.maps.map((map) => [map.key, map]));
const textAt = (key, s, t, a) => mapOf[key] ? mapOf[key].audits[a].text[s][t] : "–";
// A shade from 0 to 100.
function mixed(v) {
  return v < 50 ? `color-mix(in oklab, var(--ramp-1) ${2 * v}%, var(--ramp-0))`
    : `color-mix(in oklab, var(--ramp-2) ${2 * v - 100}%, var(--ramp-1))`;
}
const pairsAt = (s, t, a) => `${textAt("pairs", s, t, a)} pair${data.audits[a].pairs[s][t] === 1 ? "" : "s"}`;
function describe(s, t, a) {
  if (data.audits[a].pairs[s][t] === null) return "no pairs";
  const text = (key) => textAt(key, s, t, a);
  return [pairsAt(s, t, a), `${text("strict_validity")} converged`, `${text("reencoded_agreement")} survived re-encoding`,
    mapOf.judge_agreement && `the judge sees the target in ${text("judge_agreement")}`,
    text("median_steps") !== "–" && `median ${text("median_steps")} steps over a latent distance of ${text("median_distance")}`,
    text("epistemic_final") !== "–" && `disagreement ${text("epistemic_initial")} → ${text("epistemic_final")} nats`].filter(Boolean).join(", ");
}
// A median of fewer pairs is uncertain: such cells are drawn with a cut corner.
const FEW = 5;
// So many classes that cells have no room for text.
const isTiny = K > 28;
let fewSeen = false;
// What a cell shows, as its class, its content and the name that a screen reader says.
function fill(cell, s, t, a) {
  const audit = data.audits[a], say = (text) => cell.setAttribute("aria-label", text);
  if (s === t) {
    cell.className = "own";
    say(`${names[s]}: the class itself`);
  } else if (audit.pairs[s][t] === null) {
    cell.className = "none";
    cell.textContent = isTiny ? "" : "·";
    say(`${arrow(s, t)}: no pairs`);
  } else if (metric.key === "change") {
    cell.append(audit.change ? meanChange(audit.change[s][t], 40, `mean change ${arrow(s, t)}`) : "");
    say(`${arrow(s, t)}: mean change`);
  } else {
    const map = metric.audits[a], v = map.shade[s][t], text = map.text[s][t], few = audit.pairs[s][t] < FEW;
    fewSeen ||= few;
    cell.className = "value" + (few ? " few" : "") + (v > (isDark() ? 58 : 70) ? " high" : "");
    cell.style.setProperty("--heat", mixed(v));
    // The unit of a cell stands in the legend.
    cell.textContent = isTiny ? "" : text.replace("\u00a0%", "");
    say(`${arrow(s, t)}: ${text}${few ? `, of ${pairsAt(s, t, a)} only` : ""}`);
  }
}
function grid(a) {
  const audit = data.audits[a], size = isTiny ? " tiny" : K > 14 ? " dense" : "";
  // Many classes: the whole map in sight, with as many of the names as have room.
  const side = Math.max(5, Math.min(9, Math.floor(($("map").clientWidth - 96) / K))), every = isTiny ? Math.ceil(9 / side) : 1;
  // Short names of columns stand upright where they are too wide for a cell.
  const widest = Math.max(...labels.map((label) => label.length), 2), upright = !isTiny && widest > (K > 14 ? 2 : 6) ? " upright" : "";
  const head = el("tr", {}, el("td", { class: "corner" }, isTiny ? "" : ["source\u00a0↓", el("br"), "target\u00a0→"]),
    names.map((name, t) => el("th", { scope: "col", title: data.full_names[t], "aria-label": name }, t % every ? [] : el("span", {}, labels[t]))));
  const rows = names.map((name, s) => {
    const cells = names.map((_, t) => el("td", { role: "gridcell", tabindex: "-1", "data-s": s, "data-t": t, "data-a": a }));
    cells.forEach((cell, t) => fill(cell, s, t, a));
    return el("tr", {}, el("th", { scope: "row", title: data.full_names[s], "aria-label": name }, s % every ? [] : labels[s]), cells);
  });
  const table = el("table", { class: "grid" + size + upright, style: `--side: ${side}px; --names: ${widest}ch; --classes: ${K}`, role: "grid", "aria-label": `${metric.title} by class pair, ${audit.name}` },
    el("thead", {}, head), el("tbody", {}, rows));
  return el("div", { class: "map" }, several ? el("h3", {}, audit.name) : null, el("div", { class: "scroller" }, table));
}
const cellAt = (s, t, a = 0) => $("map").querySelector(`td[data-s="${s}"][data-t="${t}"][data-a="${a}"]`);
function drawMaps() {
  fewSeen = false;
  $("map").replaceChildren(...data.audits.map((_, a) => grid(a)));
  $("legend").replaceChildren(...(metric.key === "change"
    ? [el("span", {}, "removed"), el("span", { class: "bar signed", role: "img", "aria-label": "blue to orange" }), el("span", {}, "added")]
    : [el("span", {}, metric.low), el("span", { class: "bar", role: "img", "aria-label": "light to dark" }), el("span", {}, metric.high), el("b", {}, metric.unit)]),
    el("span", {}, metric.doc), ...(fewSeen && metric.key !== "pairs" ? [el("span", {}, el("i", { class: "few" }), `fewer than ${FEW} pairs`)] : []));
  mark();
}
function mark() {
  for (const cell of $("map").querySelectorAll("td[aria-selected]")) cell.removeAttribute("aria-selected");
  const at = cursor || chosen || [0, Math.min(1, K - 1)];
  for (const cell of $("map").querySelectorAll('td[tabindex="0"]')) cell.tabIndex = -1;
  data.audits.forEach((_, a) => {
    if (chosen) cellAt(chosen[0], chosen[1], a)?.setAttribute("aria-selected", "true");
    const cell = cellAt(at[0], at[1], a);
    if (cell) cell.tabIndex = 0;
  });
}
function readout(s, t) {
  const line = $("readout");
  line.replaceChildren();
  if (s === t) { line.append(el("b", {}, names[s]), ": a class is not explained towards itself."); return; }
  data.audits.forEach((audit, a) => line.append(el("b", {}, (several ? audit.name + ", " : "") + arrow(s, t)), ": " + describe(s, t, a) + ". "));
}
function cellOf(event) { return event.target.closest("td[data-s]"); }
$("map").addEventListener("mouseover", (event) => { const cell = cellOf(event); if (cell) readout(+cell.dataset.s, +cell.dataset.t); });
$("map").addEventListener("focusin", (event) => { const cell = cellOf(event); if (cell) { cursor = [+cell.dataset.s, +cell.dataset.t]; readout(...cursor); mark(); } });
$("map").addEventListener("click", (event) => { const cell = cellOf(event); if (cell) go(+cell.dataset.s, +cell.dataset.t); });
$("map").addEventListener("keydown", (event) => {
  const cell = cellOf(event);
  if (!cell) return;
  let s = +cell.dataset.s, t = +cell.dataset.t;
  if (event.key === "Enter" || event.key === " ") { event.preventDefault(); go(s, t, true); return; }
  const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], Home: [0, -K], End: [0, K] }[event.key];
  if (!move) return;
  event.preventDefault();
  s = Math.max(0, Math.min(K - 1, s + move[0])); t = Math.max(0, Math.min(K - 1, t + move[1]));
  cellAt(s, t, +cell.dataset.a).focus();
});
for (const map of choices) {
  const input = el("input", { type: "radio", name: "metric", value: map.key, on: { change: () => { metric = map; drawMaps(); } } });
  input.checked = map === metric;
  $("metrics").append(el("label", { title: map.doc }, input, el("span", {}, map.title)));
}

// -- the examples of a class pair ----------------------------------------------------------------------------------------
const kinds = { closest: "Closest", median: "Median", hardest: "Hardest", failed: "Failed" };
const figure = (node, ...caption) => el("figure", {}, node, el("figcaption", {}, caption));
const scaled = (height) => tile.height <= height ? tile.width * Math.max(1, Math.round(height / tile.height)) : Math.round(tile.width * height / tile.height);
// The ensemble's probabilities, named where another model is explained.
const led = (t) => `p(${names[t]})` + (data.has_predictor ? " by the ensemble" : "");
const large = scaled(62), small = Math.min(scaled(42), large);
function fact(name, value, bad) { return el("div", {}, el("dt", {}, name + " "), el("dd", { class: bad ? "bad" : null }, value)); }
function command(text) {
  const copy = el("button", { class: "small-button copy", type: "button", on: { click: async () => {
    try { await navigator.clipboard.writeText(text); copy.textContent = "Copied"; } catch (error) { getSelection().selectAllChildren(code); }
  } } }, "Copy");
  const code = el("code", {}, text);
  return el("pre", { class: "command" }, copy, code);
}
const quoted = (text) => /^[\w@%+=:,./-]+$/.test(text) ? text : "'" + text.replaceAll("'", `'"'"'`) + "'";
function rowFacts(row, t, extra = null) {
  const get = (name) => row[field[name]];
  const seen = (name, k, p) => k === null ? null : fact(name, `${names[k]}${k === t ? " ✓" : ""}, p(${names[t]}) ${p}`, k !== t);
  return el("dl", { class: "facts" }, extra,
    get("status") === "ok" ? null : fact("status", get("status"), true),
    fact("steps", get("steps") + (get("converged") ? "" : ", not converged"), !get("converged")),
    fact("distance", get("distance")),
    fact(led(t), get("target_prob")),
    get("epistemic") === null ? null : fact("disagreement", get("epistemic")),
    fact("aleatoric", get("aleatoric")),
    seen("re-encoded", get("reencoded"), get("reencoded_prob")),
    seen("judge", get("judge"), get("judge_prob")),
    get("predicted_prob") === null ? null : fact(`p(${names[t]}) by your model`, get("predicted_prob")),
    get("rungs") ? fact("rungs", String(get("rungs"))) : null,
    get("confirmed") === null ? null : fact("confirmed", get("confirmed") ? "✓" : "no", !get("confirmed")));
}
function strip(row, s, t, size = small) {
  const tiles = row[field.path], probs = row[field.path_prob], texts = row[field.path_text];
  if (!tiles.length) return null;
  const frames = tiles.map((index, i) => {
    const where = `${Math.round(100 * (i + 1) / (tiles.length + 1))} % of the way`;
    const bar = el("i", { style: `width: ${100 * probs[i]}%` });
    return el("div", { class: "frame" }, picture(index, size, `${where} from ${names[s]} to ${names[t]}, probability of ${names[t]} ${texts[i]}`),
      el("div", { class: "prob", "aria-hidden": "true" }, bar), el("div", { class: "p", "aria-hidden": "true" }, texts[i]));
  });
  return figure(el("div", { class: "strip" }, frames), `path from reconstruction to counterfactual, with ${led(t)}`);
}
const rowOf = (audit, id, t) => audit.rows[id]?.find((row) => row[field.target] === t);
function example(id, s, t) {
  const image = data.images[id], box = el("article", { class: "example", "aria-label": `image ${id}` });
  data.audits.forEach((audit, a) => {
    const row = rowOf(audit, id, t);
    if (several) box.append(el("p", { class: "audit-tag" }, audit.name));
    if (!row) { box.append(el("p", { class: "quiet-text" }, "this audit has no such pair")); return; }
    const from = audit.reconstructions[id], to = row[field.cf];
    const start = row[field.source];
    box.append(el("div", { class: "frames" },
      a === 0 ? figure(picture(image.x, large, `image ${id}, original`), "original") : null,
      from === undefined ? null : figure(picture(from, large, `image ${id}, reconstruction, classified as ${names[start]}`), "reconstruction"),
      figure(picture(to, large, `image ${id}, counterfactual ${names[t]}`), "counterfactual"),
      // Without a model there is no reconstruction, and the image itself has to do.
      figure(difference(from ?? image.x, to, large, `image ${id}, what changed`), from === undefined ? "difference to the original" : "difference"),
      strip(row, start, t)),
      rowFacts(row, t, a === 0 ? [
        el("div", {}, el("dt", {}, "image "), el("dd", {}, el("a", { href: "#image=" + encodeURIComponent(id) }, id))),
        image.label_name === null ? null : fact("label", image.label_name, isContradicted(image)),
      ] : []));
  });
  return box;
}
function gallery(s, t) {
  const box = $("gallery"), list = data.examples[`${s}-${t}`];
  const head = el("div", { class: "gallery-head" }, el("h2", { id: "gallery-title" }, arrow(s, t)),
    el("div", { class: "step" },
      el("button", { class: "small-button", type: "button", title: "the other way", on: { click: () => go(t, s) } }, `⇄ ${arrow(t, s)}`),
      el("button", { class: "small-button", type: "button", on: { click: () => { const cell = cellAt(s, t); cell.scrollIntoView({ block: "nearest" }); cell.focus(); } } }, "To the map")));
  const about = el("div", {}, data.audits.map((audit, a) => el("p", { class: "note" }, several ? el("b", {}, audit.name + ": ") : null, describe(s, t, a) + ".")));
  const notes = el("div", { class: "pair-note" });
  box.replaceChildren(head, notes);
  const changes = data.audits.filter((audit) => audit.change && audit.change[s][t] >= 0);
  if (changes.length) notes.append(el("div", { class: "frames" }, changes.map((audit) =>
    figure(meanChange(audit.change[s][t], large, `mean change ${arrow(s, t)}`), "mean change", several ? ", " + audit.name : ""))));
  notes.append(about);
  if (!list) {
    const asked = data.audits[0].pairs[s][t] !== null;
    box.append(el("div", { class: "empty" }, asked ? "This page does not embed the examples of this class pair. This command adds them:" : "No image of this source was explained towards this target.",
      asked ? command(`${data.command} --pair ${quoted(data.full_names[s] + ":" + data.full_names[t])}`) : null));
  } else {
    for (const kind of Object.keys(kinds)) {
      const ids = list.filter((entry) => entry[1] === kind);
      if (ids.length) box.append(el("h3", { class: "kind" }, kinds[kind]), ...ids.map(([id]) => example(id, s, t)));
    }
  }
}
function show(s, t) {
  chosen = cursor = [s, t];
  gallery(s, t);
  mark();
  readout(s, t);
}
function go(s, t, focus) {
  if (s === t || !(s >= 0 && s < K && t >= 0 && t < K)) return;
  show(s, t);
  history.replaceState(null, "", `#pair=${s}-${t}`);
  if (focus) $("gallery").focus({ preventScroll: true });
  // Beside the map it is in view already; below it, it is not.
  if (focus || $("gallery").getBoundingClientRect().top > innerHeight * 0.75) $("gallery").scrollIntoView({ block: "start" });
}
$("gallery").addEventListener("keydown", (event) => { if (event.key === "Escape" && chosen) cellAt(...chosen).focus(); });

// -- one image ------------------------------------------------------------------------------------------------------------
$("image-ids").append(...data.lookup.map((id) => el("option", { value: id })));
$("contact").append(...data.lookup.map((id) => {
  const image = data.images[id], differs = isContradicted(image);
  const seen = image.source === null ? "not read" : `classified as ${names[image.source]}`;
  const text = `image ${id}, ${seen}${differs ? `, labelled ${names[image.label]}` : ""}`;
  return el("button", { type: "button", class: differs ? "differs" : null, "data-id": id, title: text, "aria-label": text, on: { click: () => look(id) } },
    picture(image.x, tile.width <= 34 ? tile.width : 34 * Math.max(1, tile.width / tile.height), text));
}));
function look(id) {
  id = id.trim();
  $("image-id").value = id;
  const box = $("image"), image = data.images[id];
  for (const button of $("contact").children) button.setAttribute("aria-current", button.dataset.id === id);
  if (!id) { box.replaceChildren(); return; }
  if (!data.lookup.includes(id)) {
    box.replaceChildren(el("div", { class: "empty" }, `“${id}” is not among the images on this page. This command adds it:`, command(`${data.command} --image ${quoted(id)}`)));
    return;
  }
  history.replaceState(null, "", "#image=" + encodeURIComponent(id));
  if (image.error !== null) { box.replaceChildren(el("div", { class: "empty" }, `“${id}” could not be used: ${image.error}.`)); return; }
  const left = el("div", { class: "frames" }, figure(picture(image.x, scaled(112), `image ${id}, original`), "original"),
    data.audits.map((audit) => audit.reconstructions[id] === undefined ? null : figure(picture(audit.reconstructions[id], scaled(112), `image ${id}, reconstruction`), several ? `reconstruction, ${audit.name}` : "reconstruction")));
  const probs = el("div", { class: "probs" }, image.probs.map(([i, p, text]) => {
    const bar = el("i", { style: `width: ${100 * p}%` });
    return [el("span", {}, names[i]), el("span", { class: "track", "aria-hidden": "true" }, bar), el("span", { class: "num" }, text)];
  }).flat());
  const sure = image.prediction_prob === null ? "" : `, p(${names[image.prediction]}) ${image.prediction_prob}`;
  const facts = el("dl", { class: "facts" }, fact(data.has_predictor ? "your model" : "classified as", names[image.source] + (data.has_predictor ? sure : "")), image.label_name === null ? null : fact("label", image.label_name, isContradicted(image)),
    data.has_predictor || image.prediction === null ? null : fact("your model", (names[image.prediction] ?? String(image.prediction)) + sure, image.prediction !== image.source),
    fact("disagreement", image.epistemic + " nats"), fact("aleatoric", image.aleatoric + " nats"), fact("reconstruction error, L1", image.reconstruction_l1));
  const parts = [el("div", { class: "one" }, left, el("div", {}, el("h3", {}, `Image ${id}`), facts, el("p", { class: "quiet-text bars" }, data.has_predictor ? "Probabilities by the ensemble" : ""), probs))];
  data.audits.forEach((audit) => {
    const rows = audit.rows[id] || [];
    if (several) parts.push(el("p", { class: "audit-tag" }, audit.name));
    parts.push(el("ol", { class: "towards", "aria-label": "Counterfactuals, nearest first" }, rows.map((row) => {
      const t = row[field.target], from = audit.reconstructions[id] ?? image.x, to = row[field.cf];
      return el("li", {}, el("h4", {}, `→ ${names[t]}`),
        el("div", { class: "duo" }, picture(to, large, `image ${id}, counterfactual ${names[t]}`),
          difference(from, to, large, `image ${id}, what changes towards ${names[t]}`)),
        rowFacts(row, t), strip(row, row[field.source], t, Math.min(small, 28)));
    })));
    if (!rows.length) parts.push(el("p", { class: "quiet-text" }, "This image has no counterfactuals."));
  });
  box.replaceChildren(...parts);
}
$("search").addEventListener("submit", (event) => { event.preventDefault(); look($("image-id").value); });
$("image-id").addEventListener("change", () => { if (data.lookup.includes($("image-id").value.trim())) look($("image-id").value); });

// -- pictures in what the template wrote, and links into the page -----------------------------------------------------------
for (const node of document.querySelectorAll(".pic")) {
  const index = +node.dataset.tile, size = +node.dataset.size;
  node.append(node.dataset.signed ? meanChange(index, size, node.dataset.alt) : picture(index, size, node.dataset.alt));
}
function follow(scroll) {
  const pair = /^#pair=(\d+)-(\d+)$/.exec(location.hash), image = /^#image=(.+)$/.exec(location.hash);
  if (pair) { go(+pair[1], +pair[2]); if (scroll) $(matchMedia("(min-width: 1250px)").matches ? "maps" : "gallery").scrollIntoView(); }
  if (image) { look(decodeURIComponent(image[1])); if (scroll) $("images").scrollIntoView(); }
  return pair || image;
}
addEventListener("hashchange", () => follow(true));
document.addEventListener("click", (event) => {
  // A link to what the address names already changes nothing, so no event would follow.
  const link = event.target.closest('a[href^="#pair="], a[href^="#image="]');
  if (link && link.getAttribute("href") === location.hash) follow(true);
});
retheme(root.dataset.theme);
if (!follow(true)) {
  const first = document.querySelector('a[href^="#pair="]')?.getAttribute("href") || `#pair=${Object.keys(data.examples)[0] || "0-1"}`;
  show(...first.slice(6).split("-").map(Number));
  if (data.lookup.length) { look(data.lookup.find((id) => data.images[id].error === null) || data.lookup[0]); history.replaceState(null, "", location.pathname); }
}
performance.mark("clarity-interactive");
})();
