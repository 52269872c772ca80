"use strict";
// The data, made by lightning_mnn/sweeps/page.py:
//   columns  values of each column, one for each row of the table
//   scales   for each swept key: names, places and colors of its values, kind of axis, index of each row's value
//   measures columns that can be drawn;  x, color, y, only: what is drawn first
//   curves   for each job, by its index: {name: [steps, values]};  runs: names of the jobs
//   classes, jobs  class and index of the job of each row;  names: name and colour of each class;  reload: seconds or null

// ---------- statistics ----------

function logGamma(x) { // Lanczos' approximation; its relative error is below 2e-10
  const terms = [76.18009172947146, -86.50532032941677, 24.01409824083091, -1.231739572450155, 1.208650973866179e-3, -5.395239384953e-6];
  const sum = terms.reduce((total, term, k) => total + term / (x + 1 + k), 1.000000000190015);
  return (x + 0.5) * Math.log(x + 5.5) - (x + 5.5) + Math.log(2.5066282746310005 * sum / x);
}

function beta(x, a, b) { // the regularised incomplete beta function I_x(a, b), by its continued fraction
  if (x <= 0 || x >= 1) return x <= 0 ? 0 : 1;
  if (x > (a + 1) / (a + b + 2)) return 1 - beta(1 - x, b, a);
  const front = Math.exp(logGamma(a + b) - logGamma(a) - logGamma(b) + a * Math.log(x) + b * Math.log1p(-x)) / a;
  const off = (value) => (Math.abs(value) < 1e-300 ? 1e-300 : value);
  let c = 1, d = 1 / off(1 - (a + b) * x / (a + 1)), h = d;
  for (let m = 1; m < 1000; m++) {
    const even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m));
    d = 1 / off(1 + even * d); c = off(1 + even / c); h *= d * c;
    const odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1));
    d = 1 / off(1 + odd * d); c = off(1 + odd / c); h *= d * c;
    if (Math.abs(d * c - 1) < 1e-14) break;
  }
  return front * h;
}

function betaQuantile(p, a, b) {
  let low = 0, high = 1;
  for (let k = 0; k < 200 && high - low > 1e-15 * high; k++) {
    const middle = (low + high) / 2;
    if (beta(middle, a, b) < p) low = middle; else high = middle;
  }
  return (low + high) / 2;
}

function studentQuantile(df) { // t with P(|T| < t) = 95 %
  const x = betaQuantile(0.05, df / 2, 0.5);
  return Math.sqrt(df * (1 - x) / x);
}

// The mean, and its 95 % confidence interval by Student's t; none for one value. The mean of values that are never
// negative is not negative either, so the part of the interval below 0 is left out.
function meanInterval(values) {
  const n = values.length, mean = values.reduce((a, b) => a + b, 0) / n;
  if (n < 2) return { n, middle: mean, low: null, high: null };
  const variance = values.reduce((sum, v) => sum + (v - mean) ** 2, 0) / (n - 1);
  const half = studentQuantile(n - 1) * Math.sqrt(variance / n);
  return { n, middle: mean, low: values.some((v) => v < 0) ? mean - half : Math.max(mean - half, 0), high: mean + half };
}

function shareInterval(hits, n) { // share, and its exact 95 % interval by Clopper and Pearson
  return {
    n, hits, middle: hits / n,
    low: hits === 0 ? 0 : betaQuantile(0.025, hits, n - hits + 1),
    high: hits === n ? 1 : betaQuantile(0.975, hits + 1, n - hits),
  };
}

globalThis.reportStatistics = { meanInterval, shareInterval, studentQuantile };

// ---------- state ----------

const data = JSON.parse(document.getElementById("data").textContent);
const table = document.querySelector("table");
const rows = [...table.tBodies[0].rows];
const state = { sort: null, search: "", filters: {}, x: data.x, color: data.color, y: data.y, only: data.only, scale: "auto", group: data.x, metric: null, runs: null };
try { Object.assign(state, JSON.parse(decodeURIComponent(location.hash.slice(1)) || "{}")); } catch { /* another page's mark */ }
const texts = rows.map((row) => row.textContent.toLowerCase());
let shown = rows.map(() => true); // rows that the filters keep

function remember() {
  try { history.replaceState(null, "", "#" + encodeURIComponent(JSON.stringify(state))); } catch { /* not in this browser */ }
}

function number(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value !== "number") return String(value);
  return Number.isInteger(value) && Math.abs(value) < 1e6 ? String(value) : String(+value.toPrecision(4));
}

function networks(list) { return `${list.length} network${list.length === 1 ? "" : "s"}`; }

// Black or white, whichever is easier to read on a colour; the limit is where both have the same contrast.
function inkOn(color) {
  const [r, g, b] = [1, 3, 5].map((k) => parseInt(color.slice(k, k + 2), 16) / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

function html(name, attributes = {}, text = null, parent = null) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  if (parent) parent.append(made);
  return made;
}

function svg(name, attributes, parent, text = null) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  parent.append(made);
  return made;
}

function choice(parent, label, options, value, onchange) { // options: [value, text] pairs
  if (options.length < 2) return;
  const select = html("select", {}, null, html("label", {}, label + " ", parent));
  for (const [key, text] of options) html("option", { value: key }, text, select);
  select.value = value;
  if (select.selectedIndex < 0) select.selectedIndex = 0;
  select.addEventListener("change", () => { onchange(select.value); remember(); });
}

// ---------- table: sorting, filters ----------

const heads = [...table.tHead.rows[0].cells];

function sortBy(column, descending) {
  const key = heads[column].dataset.key, values = key === undefined ? data.classes : data.columns[key];
  const rank = (value) => (value === null || value === undefined ? 2 : typeof value === "number" ? 0 : 1);
  const compare = (a, b) => {
    const [u, v] = [values[a], values[b]];
    if (rank(u) !== rank(v) || rank(u) === 2) return rank(u) - rank(v); // rows without a value are last, either way
    const order = rank(u) === 0 ? u - v : String(u).localeCompare(String(v), undefined, { numeric: true });
    return descending ? -order : order;
  };
  const order = rows.map((_, k) => k).sort((a, b) => compare(a, b) || a - b);
  table.tBodies[0].append(...order.map((k) => rows[k]));
  heads.forEach((head, k) => (k === column ? head.setAttribute("aria-sort", descending ? "descending" : "ascending") : head.removeAttribute("aria-sort")));
  state.sort = [column, descending];
}

function applyFilters() {
  const words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
  const kept = Object.entries(state.filters).filter(([, value]) => value !== "");
  shown = rows.map((_, k) => words.every((word) => texts[k].includes(word)) && kept.every(([key, value]) => valueOf(key, k) === value));
  rows.forEach((row, k) => { row.hidden = !shown[k]; });
  document.getElementById("count").textContent = `${shown.filter(Boolean).length} of ${rows.length} rows.`;
  drawAll();
}

function valueOf(key, k) {
  if (key === "status") return data.columns.status[k];
  if (key === "ended in") return data.classes[k] ?? "";
  return String(data.scales[key].index[k]);
}

function setUpTable() {
  heads.forEach((head, k) => {
    const name = head.textContent;
    if (k > 0) head.dataset.key = name;
    head.textContent = "";
    html("button", { type: "button" }, name, head).addEventListener("click", () => {
      sortBy(k, state.sort !== null && state.sort[0] === k && !state.sort[1]);
      remember();
    });
  });
  if (state.sort) sortBy(...state.sort);
  const parent = document.querySelector("#filters .controls"), search = document.getElementById("search");
  search.value = state.search;
  search.addEventListener("input", () => { state.search = search.value; applyFilters(); remember(); });
  const filter = (key, options) => choice(parent, key, [["", "all"], ...options], state.filters[key] ?? "", (value) => { state.filters[key] = value; applyFilters(); });
  const statuses = [...new Set(data.columns.status)];
  if (statuses.length > 1) filter("status", statuses.map((one) => [one, one]));
  filter("ended in", Object.keys(data.names).filter((key) => data.classes.includes(key)).map((key) => [key, data.names[key].name]));
  for (const [key, scale] of Object.entries(data.scales)) filter(key, scale.names.map((name, k) => [String(k), name]));
}

function setUpRuns() {
  const known = data.jobs.map((job, k) => (data.curves[job] && data.jobs.indexOf(job) === k ? k : -1)).filter((k) => k >= 0);
  if (state.runs === null) state.runs = known.slice(0, 6).map((k) => data.jobs[k]);
  for (const k of known) {
    const box = html("input", { type: "checkbox", "aria-label": `curves of ${data.runs[data.jobs[k]]}` });
    box.checked = state.runs.includes(data.jobs[k]);
    box.addEventListener("change", () => {
      state.runs = state.runs.filter((job) => job !== data.jobs[k]);
      if (box.checked) state.runs.push(data.jobs[k]);
      drawCurves();
      remember();
    });
    rows[k].cells[0].prepend(box);
  }
}

// ---------- axes ----------

const HEIGHT = 330, LEFT = 62, RIGHT = 14, TOP = 12, BOTTOM = 46;

function niceTicks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) ticks.push(k * step);
  return ticks;
}

function powerTicks(low, high, count) {
  const [a, b] = [Math.ceil(low - 1e-9), Math.floor(high + 1e-9)];
  if (b - a < 1) return niceTicks(10 ** low, 10 ** high, count).filter((v) => v > 0);
  const every = Math.max(1, Math.ceil((b - a) / count));
  return Array.from({ length: Math.floor((b - a) / every) + 1 }, (_, k) => 10 ** (a + k * every));
}

// A vertical axis for values. On a logarithmic one exact zeros are drawn at its foot.
function verticalAxis(values, scale, limits = null) {
  const positive = values.filter((v) => v > 0), least = Math.min(...positive), most = Math.max(...positive);
  const log = !limits && positive.length > 0 && (scale === "log" || (scale === "auto" && !values.some((v) => v < 0) && most / least >= 30));
  const span = HEIGHT - TOP - BOTTOM;
  if (!log) {
    let [low, high] = limits ?? [Math.min(...values), Math.max(...values)];
    const room = limits ? 0 : 0.06 * (high - low) || 0.5 * Math.abs(high) || 1;
    [low, high] = [low - room, high + room];
    return { log, low, zeros: 0, ticks: niceTicks(low, high, 6), at: (v) => TOP + span * (1 - (v - low) / (high - low)) };
  }
  const zeros = values.filter((v) => v <= 0).length, foot = Math.floor(Math.log10(least)) - 2;
  const room = Math.max(0.05 * Math.log10(most / least), 0.15);
  const low = zeros ? foot - 0.3 : Math.log10(least) - room, high = Math.log10(most) + room;
  const at = (v) => TOP + span * (1 - ((v > 0 ? Math.max(Math.log10(v), low) : foot) - low) / (high - low));
  return { log, low: 10 ** low, zeros, foot: 10 ** foot, ticks: powerTicks(zeros ? Math.log10(least) - room : low, high, 7), at };
}

function horizontalAxis(scale, width) {
  const span = width - LEFT - RIGHT, places = scale.places, spread = places.length;
  if (scale.kind === "categories") {
    const gap = span / spread;
    return { at: (k) => LEFT + gap * (k + 0.5), gap, marks: scale.names.map((name, k) => [LEFT + gap * (k + 0.5), name]) };
  }
  const least = Math.min(...places.filter((v) => v > 0));
  const to = scale.kind === "linear" ? (v) => v : (v) => (v > 0 ? Math.log10(v) : Math.log10(least) - 0.5);
  const [low, high] = [to(places[0]), to(places[spread - 1])], room = 0.06;
  const at = (k) => LEFT + span * (room + (1 - 2 * room) * (to(places[k]) - low) / (high - low || 1));
  return { at, gap: (span / spread) * 0.7, marks: places.map((_, k) => [at(k), scale.names[k]]) };
}

function frame(figure, label) {
  figure.replaceChildren();
  const width = Math.max(figure.clientWidth, 260);
  const canvas = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img", "aria-label": label }, figure);
  return { width, canvas };
}

function drawVertical(canvas, axis, width, title) {
  for (const tick of axis.ticks) {
    const y = axis.at(tick);
    svg("line", { x1: LEFT, x2: width - RIGHT, y1: y, y2: y, class: "grid" }, canvas);
    svg("text", { x: LEFT - 6, y: y + 4, "text-anchor": "end" }, canvas, tickName(tick));
  }
  if (axis.zeros) svg("text", { x: LEFT - 6, y: axis.at(0) + 4, "text-anchor": "end" }, canvas, "0");
  svg("line", { x1: LEFT, x2: LEFT, y1: TOP, y2: HEIGHT - BOTTOM, class: "axis" }, canvas);
  svg("line", { x1: LEFT, x2: width - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM, class: "axis" }, canvas);
  svg("text", { x: 13, y: (TOP + HEIGHT - BOTTOM) / 2, "text-anchor": "middle", class: "title", transform: `rotate(-90 13 ${(TOP + HEIGHT - BOTTOM) / 2})` }, canvas, title);
}

function tickName(value) {
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(0).replace("e+", "e") : String(+value.toPrecision(3));
}

function drawHorizontal(canvas, marks, width, title) {
  let end = -Infinity;
  for (const [x, name] of marks) {
    const short = name.length > 18 ? name.slice(0, 17) + "…" : name, half = 3.6 * short.length;
    svg("line", { x1: x, x2: x, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM + 4, class: "axis" }, canvas);
    if (x - half < end + 4) continue; // names do not overlap
    svg("text", { x: Math.min(x, width - half), y: HEIGHT - BOTTOM + 17, "text-anchor": "middle" }, canvas, short);
    end = x + half;
  }
  svg("text", { x: (LEFT + width - RIGHT) / 2, y: HEIGHT - 8, "text-anchor": "middle", class: "title" }, canvas, title);
}

function legend(figure, entries) {
  if (entries.length === 0) return;
  const list = html("ul", { class: "legend" }, null, figure);
  for (const [name, color] of entries) {
    const item = html("li", {}, null, list);
    html("i", { style: `background: ${color}` }, null, item);
    item.append(name);
  }
}

// Say what a mark is: as a tooltip, and below the figure when it is clicked or has the focus.
function tell(mark, text, detail, focusable = false) {
  svg("title", {}, mark, text);
  const show = () => { detail.textContent = text; };
  mark.addEventListener("click", show);
  if (!focusable) return;
  mark.setAttribute("tabindex", "0");
  mark.setAttribute("aria-label", text);
  mark.addEventListener("focus", show);
}

// ---------- figures ----------

const ONE = { names: ["all networks"], places: [0], kind: "categories", colors: ["#0072b2"], index: null };

function scaleOf(key) { return data.scales[key] ?? ONE; }

function indexIn(scale, k) { return scale.index === null ? 0 : scale.index[k]; }

function resultOf(y, k) { // a number, or true or false for what is counted
  if (data.classes[k] === null) return null;
  if (y.startsWith("share of ")) return data.classes[k] === y.slice(9);
  return data.columns[y][k];
}

function nameOf(y) { return y.startsWith("share of ") ? `share of: ${data.names[y.slice(9)].name}` : y; }

// Swept keys, other than some, that have several values in some rows.
function pooledKeys(numbers, others) {
  return Object.keys(data.scales).filter((key) => !others.includes(key) && new Set(numbers.map((k) => data.scales[key].index[k])).size > 1);
}

function drawResults() {
  const figure = document.querySelector("#results figure");
  const x = scaleOf(state.x), color = state.color === state.x ? ONE : scaleOf(state.color);
  const counted = rows.map((_, k) => k).filter((k) => shown[k] && (state.only === "" || data.classes[k] === state.only));
  const known = counted.map((k) => [k, resultOf(state.y, k)]).filter(([, value]) => value !== null && value !== undefined);
  if (known.length === 0) { figure.replaceChildren(html("p", { class: "note" }, "No network here has this value.")); return; }
  const shares = typeof known[0][1] === "boolean";
  const groups = [];
  for (let c = 0; c < color.names.length; c++) {
    const points = [];
    for (let p = 0; p < x.names.length; p++) {
      const values = known.filter(([k]) => indexIn(x, k) === p && indexIn(color, k) === c).map(([, value]) => value);
      if (values.length) points.push({ p, ...(shares ? shareInterval(values.filter(Boolean).length, values.length) : meanInterval(values)) });
    }
    groups.push(points);
  }
  const { width, canvas } = frame(figure, `${nameOf(state.y)} against ${state.x}`);
  const detail = html("p", { class: "detail", "aria-live": "polite" });
  const heights = shares ? [0, 1] : known.map(([, value]) => value);
  const ends = shares ? [] : groups.flat().flatMap((point) => (point.high === null ? [] : [point.low, point.high]));
  let axis = verticalAxis(heights, state.scale, shares ? [0, 1] : null);
  axis = axis.log ? verticalAxis([...heights, ...ends.filter((v) => v > 0)].filter((v) => v >= Math.min(...heights)), "log") : shares ? axis : verticalAxis([...heights, ...ends], "linear");
  const across = horizontalAxis(x, width), sideways = x.kind === "categories" && groups.length > 1;
  const shift = (c) => (sideways ? across.gap * 0.8 * ((c + 0.5) / groups.length - 0.5) : 0);
  drawVertical(canvas, axis, width, nameOf(state.y));
  drawHorizontal(canvas, across.marks, width, state.x || "");
  groups.forEach((points, c) => {
    const hue = color.colors[c], place = (point) => across.at(point.p) + shift(c);
    const bounded = points.filter((point) => point.low !== null), floor = axis.log ? axis.low : -Infinity;
    if (x.kind === "categories") {
      for (const point of bounded) svg("line", { x1: place(point), x2: place(point), y1: axis.at(Math.max(point.low, floor)), y2: axis.at(point.high), stroke: hue, "stroke-width": 7, opacity: 0.25 }, canvas);
    } else if (bounded.length) {
      const up = bounded.map((point) => `${place(point)},${axis.at(point.high)}`), down = bounded.map((point) => `${place(point)},${axis.at(Math.max(point.low, floor))}`);
      if (bounded.length > 1) svg("polygon", { points: [...up, ...down.reverse()].join(" "), fill: hue, opacity: 0.17 }, canvas);
      else svg("line", { x1: place(bounded[0]), x2: place(bounded[0]), y1: up[0].split(",")[1], y2: down[0].split(",")[1], stroke: hue, "stroke-width": 7, opacity: 0.25 }, canvas);
    }
    if (x.kind !== "categories") svg("polyline", { points: points.map((point) => `${place(point)},${axis.at(point.middle)}`).join(" "), fill: "none", stroke: hue, "stroke-width": 2 }, canvas);
  });
  if (!shares) {
    const room = Math.min(across.gap * (sideways ? 0.7 / groups.length : 0.5), 40);
    known.forEach(([k, value], order) => {
      const c = indexIn(color, k), jitter = x.kind === "categories" ? room * ((order * 0.618034) % 1 - 0.5) : 0;
      const dot = svg("circle", { cx: across.at(indexIn(x, k)) + shift(c) + jitter, cy: axis.at(value), r: known.length > 400 ? 2 : 3.2, fill: color.colors[c], opacity: 0.5 }, canvas);
      tell(dot, `${data.runs[data.jobs[k]]}: ${state.y} = ${number(value)}`, detail);
    });
  }
  groups.forEach((points, c) => {
    for (const point of points) {
      const interval = point.low === null ? "no interval for one network" : `95 % [${number(point.low)}, ${number(point.high)}]`;
      const what = shares ? `${point.hits} of ${point.n} = ${number(point.middle)}` : `mean ${number(point.middle)} of n = ${point.n}`;
      const names = [state.x && `${state.x} = ${x.names[point.p]}`, color !== ONE && `${state.color} = ${color.names[c]}`].filter(Boolean);
      const mark = svg("rect", { x: across.at(point.p) + shift(c) - 5, y: axis.at(point.middle) - 5, width: 10, height: 10, fill: color.colors[c], stroke: "#fff", "stroke-width": 1.5 }, canvas);
      tell(mark, `${names.join(", ")}: ${what}, ${interval}`, detail, true);
    }
  });
  if (color !== ONE) legend(figure, color.names.map((name, c) => [`${state.color} = ${name}`, color.colors[c]]));
  const pooled = pooledKeys(known.map(([k]) => k), [state.x, color === ONE ? "" : state.color]);
  const law = shares
    ? "Squares: share of the networks of a point; band: exact 95 % interval by Clopper and Pearson."
    : "Squares: mean over the networks of a point; band: 95 % confidence interval of the mean by Student's t with n − 1 degrees of freedom, none for one network; where no value is negative, its part below 0 is left out. Dots: networks.";
  const over = pooled.length ? ` Pooled over ${pooled.join(", ")}.` : "";
  const zeros = axis.zeros ? ` Values that are exactly 0 (${heights.filter((v) => v <= 0).length}) are at the foot.` : "";
  figure.append(detail, html("figcaption", {}, `${networks(known)}${state.only ? `, only: ${data.names[state.only].name}` : ""}. ${law}${over}${zeros}`));
}

function drawKinds() {
  const figure = document.querySelector("#kinds figure"), x = scaleOf(state.group);
  const chosen = { ...state.filters };
  delete chosen["ended in"]; // shares of one class alone would say nothing
  const kept = Object.entries(chosen).filter(([, value]) => value !== "");
  const words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
  const known = rows.map((_, k) => k).filter((k) => data.classes[k] !== null && words.every((word) => texts[k].includes(word)) && kept.every(([key, value]) => valueOf(key, k) === value));
  if (known.length === 0) { figure.replaceChildren(html("p", { class: "note" }, "No job here has a result.")); return; }
  const { width, canvas } = frame(figure, `classes of the networks against ${state.group}`);
  const detail = html("p", { class: "detail", "aria-live": "polite" });
  const axis = verticalAxis([0, 1], "linear", [0, 1]), across = horizontalAxis({ ...x, kind: "categories" }, width);
  drawVertical(canvas, axis, width, "share of the networks");
  drawHorizontal(canvas, across.marks, width, state.group || "");
  x.names.forEach((name, p) => {
    const group = known.filter((k) => indexIn(x, k) === p), bar = Math.min(across.gap * 0.8, 70);
    let below = 0;
    for (const [key, look] of Object.entries(data.names)) {
      const hits = group.filter((k) => data.classes[k] === key).length;
      if (hits === 0) continue;
      const share = shareInterval(hits, group.length), top = axis.at(below + share.middle);
      const part = svg("rect", { x: across.at(p) - bar / 2, width: bar, y: top, height: axis.at(below) - top, fill: look.color, stroke: "#fff", "stroke-width": 0.7 }, canvas);
      tell(part, `${state.group ? `${state.group} = ${name}: ` : ""}${look.name}: ${hits} of ${group.length} = ${number(share.middle)}, 95 % [${number(share.low)}, ${number(share.high)}]`, detail, true);
      if (bar > 18 && axis.at(below) - top > 15) svg("text", { x: across.at(p), y: (axis.at(below) + top) / 2 + 4, "text-anchor": "middle", style: `fill: ${inkOn(look.color)}; font-weight: 600; pointer-events: none` }, canvas, String(hits));
      below += share.middle;
    }
  });
  legend(figure, Object.values(data.names).map((look) => [look.name, look.color]));
  const pooled = pooledKeys(known, [state.group]);
  const over = pooled.length ? ` Pooled over ${pooled.join(", ")}.` : "";
  figure.append(detail, html("figcaption", {}, `${networks(known)}; numbers: counts. Click a part for its share with the exact 95 % interval by Clopper and Pearson. Only certificates count.${over}`));
}

function drawCurves() {
  const figure = document.querySelector("#curves figure");
  const name = state.metric, kept = new Set(data.jobs.filter((_, k) => shown[k]));
  const runs = state.runs.filter((job) => kept.has(job) && data.curves[job]?.[name]);
  if (runs.length === 0) { figure.replaceChildren(html("p", { class: "note" }, "Tick networks in the table to draw their curves.")); return; }
  const { width, canvas } = frame(figure, `${name} over training`);
  const detail = html("p", { class: "detail", "aria-live": "polite" });
  const points = runs.flatMap((job) => data.curves[job][name][1]), steps = runs.flatMap((job) => data.curves[job][name][0]);
  const axis = verticalAxis(points, "auto"), most = Math.max(...steps), least = Math.min(...steps);
  const at = (step) => LEFT + (width - LEFT - RIGHT) * (most > least ? (step - least) / (most - least) : 0.5);
  drawVertical(canvas, axis, width, name);
  drawHorizontal(canvas, niceTicks(least, most > least ? most : least + 1, width < 500 ? 4 : 8).filter((step) => step <= most).map((step) => [at(step), String(step)]), width, "optimiser step");
  const colors = runs.map((job, k) => data.colors[k % data.colors.length]);
  runs.forEach((job, k) => {
    const [places, values] = data.curves[job][name];
    const line = svg("polyline", { points: places.map((step, n) => `${at(step)},${axis.at(values[n])}`).join(" "), fill: "none", stroke: colors[k], "stroke-width": 1.8, "stroke-dasharray": k < data.colors.length ? "none" : "5 3" }, canvas);
    if (places.length === 1) svg("circle", { cx: at(places[0]), cy: axis.at(values[0]), r: 3, fill: colors[k] }, canvas);
    tell(line, `${data.runs[job]}: last ${number(values[values.length - 1])}`, detail);
  });
  legend(figure, runs.slice(0, 24).map((job, k) => [data.runs[job], colors[k]]));
  figure.append(detail, html("figcaption", {}, `${runs.length} of ${Object.keys(data.curves).length} jobs with curves; means over the replicas of a job. Long curves are thinned to ${data.points} points.${axis.zeros ? " Values that are exactly 0 are at the foot." : ""}`));
}

function drawAll() {
  drawResults();
  drawKinds();
  drawCurves();
}

function setUpFigures() {
  const keys = Object.keys(data.scales).map((key) => [key, key]), classes = Object.entries(data.names).map(([key, look]) => [key, look.name]);
  const measures = [...data.measures.map((key) => [key, key]), ...classes.map(([key, name]) => [`share of ${key}`, `share of: ${name}`])];
  const results = document.querySelector("#results .controls");
  if (!measures.some(([key]) => key === state.y)) state.y = measures[0][0];
  choice(results, "draw", measures, state.y, (value) => { state.y = value; drawResults(); });
  choice(results, "against", keys, state.x, (value) => { state.x = value; drawResults(); });
  choice(results, "colour", [["", "none"], ...keys], state.color, (value) => { state.color = value; drawResults(); });
  choice(results, "of", [["", "all networks"], ...classes], state.only, (value) => { state.only = value; drawResults(); });
  choice(results, "scale", [["auto", "auto"], ["linear", "linear"], ["log", "log"]], state.scale, (value) => { state.scale = value; drawResults(); });
  choice(document.querySelector("#kinds .controls"), "against", [...keys, ["", "all together"]], state.group, (value) => { state.group = value; drawKinds(); });
  const names = [...new Set(Object.values(data.curves).flatMap(Object.keys))];
  if (!names.includes(state.metric)) state.metric = names[0] ?? null;
  choice(document.querySelector("#curves .controls"), "draw", names.map((name) => [name, name]), state.metric, (value) => { state.metric = value; drawCurves(); });
  document.getElementById("curves").hidden = names.length === 0;
}

function setUpReload() {
  if (data.reload === null) return;
  const place = document.getElementById("watch"), box = place.querySelector("input");
  place.hidden = false;
  setInterval(() => { if (box.checked && document.activeElement?.tagName !== "SELECT") location.reload(); }, 1000 * data.reload);
}

for (const part of document.querySelectorAll(".script")) part.hidden = false;
setUpTable();
setUpRuns();
setUpFigures();
applyFilters();
setUpReload();
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; drawAll(); } });
