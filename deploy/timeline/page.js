"use strict";
// Draws the reply of /v1/polymux/timeline: a lane for each worker, a row for each kind of span, all on one wall clock.
// Spans are typed arrays sorted by their beginning; a draw touches only what is in view. Where spans are too short to be told apart, a
// column of two pixels shows each model's share of its time, so that thousands of short switches do not look like one long one.

const KINDS = { // in the order of their rows; `rows` is how many overlapping spans are shown one above the other
  active: { label: "model", height: 15, rows: 1 },
  switch: { label: "switch", height: 11, rows: 1 },
  prefetch: { label: "prefetch", height: 11, rows: 1 },
  prefill: { label: "prefill", height: 24, rows: 1 },
  decode: { label: "decode", height: 24, rows: 1 },
  kv_in: { label: "KV in", height: 15, rows: 3 },
  kv_out: { label: "KV out", height: 15, rows: 3 },
  swap_in: { label: "swap in", height: 12, rows: 2 },
  swap_out: { label: "swap out", height: 12, rows: 2 },
};
const NAMES = { active: "active model", switch: "switch", prefetch: "prefetch of weights", prefill: "prefill", decode: "decode",
  kv_in: "KV arriving", kv_out: "KV leaving", swap_in: "KV back from the host", swap_out: "KV to the host" };
const HUES = [[255, 0], [60, 0.05], [150, 0], [15, -0.02], [300, -0.03], [100, 0.1], [200, 0.03], [340, 0.02]]; // degrees, and lighter by
const GUTTER = 84, PAD = 18, HEAD = 30, GAP = 3, TAIL = 10; // pixels
const COLUMN = 2; // pixels
const MIN_SPAN_S = 20e-6; // the narrowest view
const LIVE_MS = 2000;

const $ = (id) => document.getElementById(id);
const overview = $("overview"), axis = $("axis"), lanesCanvas = $("lanes"), stage = $("stage"), tip = $("tip");
let data, lanes, models, colors, bins, range, view, chosen = -1, hovered = null, theme = {}, pending = false, liveTimer = 0;

// -- the data ---------------------------------------------------------------------------------------------------------

/** One row of the page: the spans of one kind on one worker. */
function makeTrack(kind, rows, column, madeAt) {
  const { began_s, seconds, model, nbytes, num_seqs, num_tokens, num_steps } = column;
  const spans = rows.map((row) => ({ row, start: madeAt - row[began_s] })).sort((a, b) => a.start - b.start);
  const n = spans.length, track = { kind, n, start: new Float64Array(n), end: new Float64Array(n), reach: new Float64Array(n),
    model: new Uint16Array(n), level: new Uint8Array(n), nbytes: new Float64Array(n), seqs: new Uint32Array(n),
    tokens: new Float64Array(n), steps: new Uint32Array(n), maxSeqs: 1, numRows: 1 };
  const free = new Array(KINDS[kind].rows).fill(-Infinity);
  let reach = -Infinity;
  spans.forEach(({ row, start }, i) => {
    const end = start + row[seconds];
    let level = free.findIndex((until) => until <= start + 1e-6);
    if (level < 0) level = free.length - 1;
    free[level] = Math.max(free[level], end);
    track.numRows = Math.max(track.numRows, level + 1);
    reach = Math.max(reach, end);
    track.start[i] = start; track.end[i] = end; track.reach[i] = reach; track.level[i] = level;
    track.model[i] = modelIndex(row[model]); track.nbytes[i] = row[nbytes]; track.seqs[i] = row[num_seqs];
    track.tokens[i] = row[num_tokens]; track.steps[i] = row[num_steps];
    track.maxSeqs = Math.max(track.maxSeqs, row[num_seqs]);
  });
  return track;
}

function modelIndex(name) {
  if (!models.has(name)) models.set(name, models.size);
  return models.get(name);
}

/** Seconds count from `data.now_s`, so that doubles keep their microseconds: now is 0, the past is negative. */
function load(reply) {
  data = reply;
  models = new Map();
  const column = Object.fromEntries(reply.columns.map((name, i) => [name, i]));
  lanes = reply.lanes.map((lane) => {
    const byKind = new Map();
    for (const row of lane.spans) {
      const kind = row[column.kind];
      if (kind in KINDS) (byKind.get(kind) ?? byKind.set(kind, []).get(kind)).push(row);
    }
    const tracks = Object.keys(KINDS).filter((kind) => byKind.has(kind)).map((kind) => makeTrack(kind, byKind.get(kind), column, -lane.age_s));
    return { ...lane, spans: lane.spans.length, tracks };
  });
  let first = Infinity;
  for (const lane of lanes) for (const track of lane.tracks) if (track.kind !== "active" && track.n) first = Math.min(first, track.start[0]);
  const start = Math.max(Number.isFinite(first) ? first : -reply.within_s, -reply.within_s);
  const pad = Math.max(-start, 0.1) * 0.01;
  range = { start: start - pad, end: pad };
  placeLanes();
}

function placeLanes() {
  let y = 4;
  for (const lane of lanes) {
    lane.y = y;
    y += HEAD;
    for (const track of lane.tracks) {
      track.y = y;
      track.height = KINDS[track.kind].height;
      y += track.height + GAP;
    }
    if (!lane.tracks.length) y += 20;
    lane.bottom = y += TAIL;
  }
  stage.style.height = `${Math.max(y, 120)}px`;
}

// -- colours ----------------------------------------------------------------------------------------------------------

function hash(text) {
  let h = 2166136261;
  for (const c of text) h = Math.imul(h ^ c.codePointAt(0), 16777619);
  return (h ^ (h >>> 15)) >>> 0;
}

/** A model's colour follows from its name; where two would share one, the later in the alphabet takes the next that is free.
 *  Once all hues are taken they come again darker, and then paler. */
function chooseColors() {
  const found = new Map(), { lightness, chroma } = theme, number = HUES.length;
  let taken = new Set();
  for (const name of [...models.keys()].sort()) {
    if (taken.size === number) taken = new Set();
    let slot = hash(name) % number;
    while (taken.has(slot)) slot = (slot + 1) % number;
    taken.add(slot);
    const ring = Math.floor(found.size / number) % 3;
    const [hue, lighter] = HUES[slot];
    found.set(name, `oklch(${+lightness + lighter + [0, -0.16, 0.1][ring]} ${chroma * [1, 0.85, 0.6][ring]} ${hue})`);
  }
  colors = [...models.keys()].map((name) => found.get(name));
}

function readTheme() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["panel", "ink", "soft", "faint", "line", "row", "warn", "accent", "shade", "lightness", "chroma", "sans"]) {
    theme[name] = style.getPropertyValue(`--${name}`).trim();
  }
  chooseColors();
}

function setTheme(isDark) {
  document.documentElement.classList.toggle("dark", isDark);
  readTheme();
  fillLegend();
  drawAll();
}

// -- drawing ----------------------------------------------------------------------------------------------------------

function context(canvas, height) {
  const ratio = window.devicePixelRatio || 1, width = canvas.clientWidth;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.height = `${height}px`;
  }
  const ctx = canvas.getContext("2d");
  ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
  ctx.clearRect(0, 0, width, height);
  return [ctx, width];
}

const plotWidth = () => lanesCanvas.clientWidth - GUTTER - PAD - PAD;
const toX = (t) => GUTTER + PAD + ((t - view.start) / (view.end - view.start)) * plotWidth();
const toTime = (x) => view.start + ((x - GUTTER - PAD) / plotWidth()) * (view.end - view.start);

function firstReaching(track, t) {
  let low = 0, high = track.n;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (track.reach[middle] < t) low = middle + 1; else high = middle;
  }
  return low;
}

function draw() {
  pending = false;
  if (!lanes) return;
  drawOverview();
  drawAxis();
  drawLanes();
}

function drawAll() {
  countBins();
  draw();
}

function later() {
  if (!pending) {
    pending = true;
    requestAnimationFrame(draw);
  }
}

function drawLanes() {
  const top = document.querySelector("header").offsetHeight;
  lanesCanvas.style.top = `${top}px`;
  const height = Math.min(stage.clientHeight, Math.max(window.innerHeight - top, 80));
  const [ctx, width] = context(lanesCanvas, height);
  const scrolled = Math.max(0, lanesCanvas.offsetTop);
  ctx.textBaseline = "middle";
  drawTicks(ctx, height);
  for (const lane of lanes) {
    if (lane.bottom < scrolled || lane.y > scrolled + height) continue;
    const seen = { busy_s: 0, switch_s: 0, tokens: 0, prompt: 0 };
    for (const track of lane.tracks) drawTrack(ctx, track, -scrolled, width, seen);
    drawHead(ctx, lane, -scrolled, width, seen);
  }
  if (hovered) outline(ctx, hovered, -scrolled);
  document.documentElement.dataset.drawn = String(Number(document.documentElement.dataset.drawn || 0) + 1);
}

function drawHead(ctx, lane, offset, width, seen) {
  const y = lane.y + offset + HEAD / 2 + 3;
  ctx.fillStyle = theme.panel;
  ctx.fillRect(0, lane.y + offset + 1, width, HEAD - 4); // no grid behind the words
  ctx.fillStyle = theme.line;
  if (lane.y > 10) ctx.fillRect(0, lane.y + offset, width, 1);
  ctx.textAlign = "left";
  ctx.font = `600 13px ${theme.sans}`;
  ctx.fillStyle = theme.ink;
  ctx.fillText(lane.worker_id, PAD, y);
  const x = PAD + ctx.measureText(lane.worker_id).width + 12;
  ctx.font = `12px ${theme.sans}`;
  if (lane.missing) {
    ctx.fillStyle = theme.warn;
    ctx.fillText(`missing: ${lane.missing}`, x, y);
    return;
  }
  const span = view.end - view.start, parts = [];
  parts.push(`${percent(seen.busy_s / span)} computing`);
  if (seen.switch_s) parts.push(`${percent(seen.switch_s / span)} switching`);
  if (seen.prompt) parts.push(`${amount(seen.prompt / span)} prompt tokens/s`);
  if (seen.tokens) parts.push(`${amount(seen.tokens / span)} tokens/s`);
  ctx.fillStyle = theme.soft;
  ctx.fillText(parts.join("   ·   "), x, y);
}

function drawTrack(ctx, track, offset, width, seen) {
  const { kind, height, start, end, model, level } = track, y = track.y + offset;
  const left = GUTTER + PAD, right = width - PAD, k = plotWidth() / (view.end - view.start);
  ctx.fillStyle = theme.row;
  ctx.fillRect(left, y, right - left, height);
  ctx.fillStyle = theme.faint;
  ctx.textAlign = "right";
  ctx.font = `11px ${theme.sans}`;
  ctx.fillText(KINDS[kind].label, left - 10, y + height / 2 + 0.5);
  const rowHeight = height / track.numRows, least = kind === "switch" ? 1.5 : 1, last = new Array(track.numRows).fill(-1);
  const columns = track.numRows === 1 ? clearColumns(Math.ceil((right - left) / COLUMN) + 1) : null;
  for (let i = firstReaching(track, view.start); i < track.n && start[i] < view.end; i++) {
    if (end[i] < view.start) continue;
    count(track, i, seen);
    let x = left + (start[i] - view.start) * k, wide = (end[i] - start[i]) * k;
    if (columns && wide < COLUMN) {
      if (x >= left && x < right) addToColumn(columns, Math.floor((x - left) / COLUMN), i, model[i], wide / COLUMN, part(track, i));
      continue;
    }
    if (wide < least) {
      const pixel = Math.floor(x);
      if (last[level[i]] === pixel) continue;
      last[level[i]] = pixel;
      wide = least;
    }
    if (x < left) { wide -= left - x; x = left; }
    wide = Math.min(wide, right - x);
    if (wide <= 0) continue;
    paint(ctx, track, i, x, y, wide, rowHeight);
  }
  if (columns) {
    for (const b of columns.used) {
      if (columns.count[b] > 1) paintColumn(ctx, track, columns, b, left + b * COLUMN, y);
      else paint(ctx, track, columns.last[b], left + (start[columns.last[b]] - view.start) * k, y, Math.max(columns.time[b] * COLUMN, least), rowHeight);
    }
  }
  ctx.globalAlpha = 1;
}

// -- columns of spans too short to be told apart ----------------------------------------------------------------------

let scratch = { number: 0, models: 0 };

/** Shares of each column's time by model; one set of arrays serves every track. */
function clearColumns(number) {
  if (scratch.number < number || scratch.models !== models.size) {
    const shares = new Float64Array(number * models.size);
    scratch = { number, models: models.size, shares, count: new Uint32Array(number), last: new Uint32Array(number), time: new Float64Array(number), used: [] };
  }
  for (const b of scratch.used) {
    scratch.count[b] = scratch.time[b] = 0;
    scratch.shares.fill(0, b * scratch.models, (b + 1) * scratch.models);
  }
  scratch.used = [];
  return scratch;
}

function addToColumn(columns, b, i, m, share, weight) {
  if (!columns.count[b]) columns.used.push(b);
  columns.count[b]++;
  columns.last[b] = i;
  columns.time[b] += share;
  columns.shares[b * columns.models + m] += share * weight;
}

/** The models of a column one above the other. What takes next to no time is still to be seen. */
function paintColumn(ctx, track, columns, b, x, y) {
  const { kind, height } = track, shares = columns.shares.subarray(b * columns.models, (b + 1) * columns.models);
  let sum = 0;
  for (const share of shares) sum += share;
  const least = kind === "switch" ? 0.3 : 0.12, whole = kind === "active" ? 1 : Math.min(Math.max(sum, least), 1);
  let floor = y + height;
  for (let m = 0; m < shares.length; m++) {
    if (!shares[m]) continue;
    const tall = (shares[m] / sum) * whole * height;
    floor -= tall;
    ctx.fillStyle = colors[m];
    ctx.globalAlpha = alpha(kind) * (chosen >= 0 && chosen !== m ? 0.13 : 1);
    ctx.fillRect(x, floor, COLUMN, tall);
  }
}

const alpha = (kind) => (kind === "active" ? 0.5 : kind === "prefetch" ? 0.6 : 1);

/** How much of its row's height a span takes: a decode bar is as high as its batch is large, against the largest one here. */
const part = (track, i) => (track.kind === "decode" ? 0.3 + 0.7 * Math.min(track.seqs[i] / track.maxSeqs, 1) : 1);

function paint(ctx, track, i, x, y, wide, rowHeight) {
  const isDim = chosen >= 0 && chosen !== track.model[i];
  ctx.fillStyle = colors[track.model[i]];
  const room = rowHeight - (track.numRows > 1 ? 1 : 0), tall = room * part(track, i), top = y + track.level[i] * rowHeight + room - tall;
  ctx.globalAlpha = alpha(track.kind) * (isDim ? 0.13 : 1);
  const gap = wide > 4 ? 0.75 : 0; // neighbours of one model stay apart where there is room
  ctx.fillRect(x, top, wide - gap, tall);
  if (track.kind === "active" && wide > 54 && !isDim) label(ctx, names()[track.model[i]], x + 6, y + rowHeight / 2 + 0.5, wide - 12);
}

let nameList = [];
const names = () => (nameList.length === models.size ? nameList : (nameList = [...models.keys()]));

function label(ctx, text, x, y, room) {
  ctx.globalAlpha = 1;
  ctx.fillStyle = theme.ink;
  ctx.textAlign = "left";
  ctx.font = `11px ${theme.sans}`;
  if (ctx.measureText(text).width <= room) ctx.fillText(text, x, y);
}

/** Adds the part of a span that is in view. */
function count(track, i, seen) {
  const length = track.end[i] - track.start[i];
  const inside = Math.min(track.end[i], view.end) - Math.max(track.start[i], view.start);
  const part = length > 0 ? inside / length : 1;
  if (track.kind === "prefill" || track.kind === "decode") seen.busy_s += Math.max(inside, 0);
  if (track.kind === "switch") seen.switch_s += Math.max(inside, 0);
  if (track.kind === "decode") seen.tokens += track.tokens[i] * part;
  if (track.kind === "prefill") seen.prompt += track.tokens[i] * part;
}

function outline(ctx, { track, i }, offset) {
  const rowHeight = track.height / track.numRows, y = track.y + offset + track.level[i] * rowHeight;
  const x = Math.max(toX(track.start[i]), GUTTER + PAD), until = Math.min(toX(track.end[i]), lanesCanvas.clientWidth - PAD);
  ctx.strokeStyle = theme.ink;
  ctx.lineWidth = 1.5;
  ctx.strokeRect(x - 0.75, y - 0.75, Math.max(until - x, 1) + 1.5, rowHeight + 0.5);
}

// -- the axis and the overview ----------------------------------------------------------------------------------------

/** About one tick each 110 pixels, at round wall-clock times. */
function ticks() {
  const wanted = ((view.end - view.start) * 110) / Math.max(plotWidth(), 1);
  const power = 10 ** Math.floor(Math.log10(wanted));
  let step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= wanted);
  if (wanted > 10) step = [15, 30, 60, 120, 300, 600, 1800, 3600].find((s) => s >= wanted) ?? 3600;
  const base = Math.floor(data.now_s), found = [];
  for (let n = Math.ceil((view.start + data.now_s - base) / step); found.length < 60; n++) {
    const t = n * step - (data.now_s - base);
    if (t > view.end) break;
    found.push({ t, text: clock(base + n * step, step) });
  }
  return found;
}

function clock(seconds, step) {
  const date = new Date(Math.floor(seconds + 1e-9) * 1000), digits = step >= 1 ? 0 : Math.min(Math.ceil(-Math.log10(step) - 1e-9), 6);
  const text = date.toLocaleTimeString("en-GB");
  if (!digits) return text;
  const rest = Math.min(Math.max(seconds - Math.floor(seconds + 1e-9), 0), 0.9999999);
  return text + rest.toFixed(digits).slice(1);
}

function drawTicks(ctx, height) {
  ctx.fillStyle = theme.line;
  for (const { t } of ticks()) {
    const x = toX(t);
    if (x >= GUTTER + PAD) ctx.fillRect(Math.round(x), 0, 1, height);
  }
}

function drawAxis() {
  const [ctx, width] = context(axis, 26);
  ctx.font = `11px ${theme.sans}`;
  ctx.textBaseline = "middle";
  ctx.textAlign = "left";
  for (const { t, text } of ticks()) {
    const x = toX(t);
    if (x < GUTTER + PAD || x + ctx.measureText(text).width > width) continue;
    ctx.fillStyle = theme.line;
    ctx.fillRect(Math.round(x), 6, 1, 20);
    ctx.fillStyle = theme.soft;
    ctx.fillText(text, x + 5, 14);
  }
  ctx.fillStyle = theme.faint;
  ctx.textAlign = "right";
  ctx.fillText(duration(view.end - view.start), GUTTER + PAD - 10, 14);
}

/** Decoded tokens per second of each model over the whole range, in columns of a few pixels. */
function countBins() {
  const width = Math.max(plotWidth(), 50), number = Math.ceil(width / 3), seconds = (range.end - range.start) / number;
  bins = { number, seconds, values: colors.map(() => new Float64Array(number)), most: 0 };
  for (const lane of lanes) {
    for (const track of lane.tracks) {
      if (track.kind !== "decode") continue;
      for (let i = 0; i < track.n; i++) spread(track, i, bins.values[track.model[i]]);
    }
  }
  for (let b = 0; b < number; b++) bins.most = Math.max(bins.most, bins.values.reduce((sum, one) => sum + one[b], 0));
}

function spread(track, i, values) {
  const { seconds, number } = bins, length = Math.max(track.end[i] - track.start[i], 1e-9);
  const low = Math.max(Math.floor((track.start[i] - range.start) / seconds), 0);
  const high = Math.min(Math.floor((track.end[i] - range.start) / seconds), number - 1);
  for (let b = low; b <= high; b++) {
    const from = range.start + b * seconds;
    const inside = Math.min(track.end[i], from + seconds) - Math.max(track.start[i], from);
    values[b] += (track.tokens[i] * Math.max(inside, 0)) / length / seconds;
  }
}

const overX = (t) => GUTTER + PAD + ((t - range.start) / (range.end - range.start)) * plotWidth();
const overTime = (x) => range.start + ((x - GUTTER - PAD) / plotWidth()) * (range.end - range.start);

function drawOverview() {
  const height = 66, [ctx, width] = context(overview, height), floor = height - 2, room = height - 14;
  const left = GUTTER + PAD, wide = plotWidth() / bins.number;
  ctx.fillStyle = theme.row;
  ctx.fillRect(left, 0, width - PAD - left, height);
  const heights = new Float64Array(bins.number);
  bins.values.forEach((values, m) => {
    ctx.fillStyle = colors[m];
    ctx.globalAlpha = chosen >= 0 && chosen !== m ? 0.13 : 0.95;
    for (let b = 0; b < bins.number; b++) {
      if (!values[b]) continue;
      const tall = (values[b] / bins.most) * room;
      heights[b] += tall;
      ctx.fillRect(left + b * wide, floor - heights[b], Math.max(wide - 0.6, 0.8), tall);
    }
  });
  ctx.globalAlpha = 1;
  ctx.font = `11px ${theme.sans}`;
  ctx.textAlign = "right";
  ctx.textBaseline = "middle";
  ctx.fillStyle = theme.faint;
  ctx.fillText("tokens/s", left - 10, height - 12);
  ctx.fillText(amount(bins.most), left - 10, 12);
  const from = Math.max(overX(view.start), left), until = Math.min(overX(view.end), width - PAD);
  ctx.fillStyle = theme.shade;
  ctx.fillRect(left, 0, from - left, height);
  ctx.fillRect(until, 0, width - PAD - until, height);
  if (until - from < plotWidth() - 2) {
    ctx.strokeStyle = theme.accent;
    ctx.lineWidth = 1.5;
    ctx.strokeRect(from, 0.75, Math.max(until - from, 2), height - 1.5);
  }
}

// -- words ------------------------------------------------------------------------------------------------------------

function percent(part) { return `${(100 * part).toFixed(part < 0.0995 ? 1 : 0)}%`; }
function amount(value) { return value === 0 ? "0" : value >= 100 ? Math.round(value).toLocaleString("en-US") : value.toFixed(value >= 10 ? 0 : 1); }
function duration(s) {
  if (s >= 120) return `${(s / 60).toFixed(1)} min`;
  if (s >= 1) return `${s.toFixed(s >= 10 ? 1 : 2)} s`;
  return s >= 1e-3 ? `${(s * 1e3).toFixed(s >= 1e-2 ? 1 : 2)} ms` : `${(s * 1e6).toFixed(0)} µs`;
}
function size(bytes) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (bytes < 1024 || unit === "GiB") return `${unit === "B" ? bytes : bytes.toFixed(bytes < 10 ? 2 : 1)} ${unit}`;
    bytes /= 1024;
  }
}

function fillLegend() {
  const totals = new Float64Array(models.size);
  for (const lane of lanes) for (const t of lane.tracks) if (t.kind === "decode") for (let i = 0; i < t.n; i++) totals[t.model[i]] += t.tokens[i];
  const legend = $("legend");
  legend.replaceChildren(...names().map((name, m) => ({ name, m })).sort((a, b) => (a.name < b.name ? -1 : 1)).map(({ name, m }) => {
    const button = document.createElement("button"), swatch = document.createElement("i"), tokens = document.createElement("span");
    swatch.style.background = colors[m];
    tokens.textContent = `${amount(totals[m])} tokens`;
    button.append(swatch, name, tokens);
    button.setAttribute("aria-pressed", String(chosen === m));
    button.onclick = () => { chosen = chosen === m ? -1 : m; fillLegend(); later(); };
    return button;
  }));
  legend.classList.toggle("chosen", chosen >= 0);
}

function fillAbout() {
  const count = lanes.reduce((sum, lane) => sum + lane.spans, 0), missing = lanes.filter((lane) => lane.missing).length;
  const when = new Date(data.now_s * 1000);
  $("about").textContent = `${lanes.length} workers${missing ? ` (${missing} missing)` : ""}, ${models.size} models, ` +
    `${count.toLocaleString("en-US")} spans of ${duration(range.end - range.start)} before ${when.toLocaleString("en-GB")}`;
  const overflows = stage.clientHeight > window.innerHeight - stage.offsetTop;
  $("hint").innerHTML = `${overflows ? "<kbd>ctrl</kbd> + " : ""}scroll to zoom, drag to move, double-click to see all; ` +
    `<kbd>W</kbd> <kbd>S</kbd> zoom, <kbd>A</kbd> <kbd>D</kbd> move, <kbd>0</kbd> all. A decode bar is as high as its batch is large; ` +
    `where spans are too short to be told apart, heights are shares of the time.`;
  Object.assign(document.documentElement.dataset, { lanes: lanes.length, spans: count, models: models.size });
}

function describe(track, i) {
  const rows = [], length = track.end[i] - track.start[i], wall = data.now_s + track.start[i];
  const isOpen = track.kind === "active" && track.end[i] > -0.05 - 1;
  rows.push(["began", clock(wall, 0.001)], [isOpen ? "so far" : "took", duration(length)]);
  if (track.steps[i] > 1) rows.push(["steps", `${track.steps[i]} of ${duration(length / track.steps[i])}`]);
  if (track.seqs[i]) rows.push([track.kind === "decode" ? "batch, at most" : "sequences", String(track.seqs[i])]);
  if (track.tokens[i]) rows.push(["tokens", track.tokens[i].toLocaleString("en-US")]);
  if (track.tokens[i] && length > 0 && (track.kind === "decode" || track.kind === "prefill")) rows.push(["tokens/s", amount(track.tokens[i] / length)]);
  if (track.nbytes[i]) rows.push(["bytes", size(track.nbytes[i])]);
  if (track.nbytes[i] && length > 0) rows.push(["bandwidth", `${size(track.nbytes[i] / length)}/s`]);
  return rows;
}

function showTip(event, found) {
  if (!found) { tip.hidden = true; return; }
  const { lane, track, i } = found, title = document.createElement("h2"), swatch = document.createElement("i"), list = document.createElement("dl");
  swatch.style.background = colors[track.model[i]];
  title.append(swatch, names()[track.model[i]]);
  const rows = [[NAMES[track.kind], lane.worker_id], ...describe(track, i)];
  if (lane.uncertainty_s > 0.001) rows.push(["clock, give or take", duration(lane.uncertainty_s)]);
  for (const [name, value] of rows) {
    const dt = document.createElement("dt"), dd = document.createElement("dd");
    dt.textContent = name;
    dd.textContent = value;
    list.append(dt, dd);
  }
  tip.replaceChildren(title, list);
  tip.hidden = false;
  const x = Math.min(event.clientX + 16, window.innerWidth - tip.offsetWidth - 8);
  const below = event.clientY + 18, y = below + tip.offsetHeight > window.innerHeight ? event.clientY - tip.offsetHeight - 12 : below;
  tip.style.left = `${Math.max(x, 4)}px`;
  tip.style.top = `${Math.max(y, 4)}px`;
}

// -- what the reader does ---------------------------------------------------------------------------------------------

/** The span under the pointer, the shortest where several are; a few pixels of mercy for thin ones. */
function find(event) {
  const box = lanesCanvas.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top + lanesCanvas.offsetTop;
  if (x < GUTTER + PAD) return null;
  const slack = (3 * (view.end - view.start)) / plotWidth(), t = toTime(x);
  for (const lane of lanes) {
    for (const track of lane.tracks) {
      if (y < track.y || y >= track.y + track.height) continue;
      const level = Math.min(Math.floor((y - track.y) / (track.height / track.numRows)), track.numRows - 1);
      let best = null, least = Infinity;
      for (let i = firstReaching(track, t - slack); i < track.n && track.start[i] <= t + slack; i++) {
        if (track.end[i] < t - slack || track.level[i] !== level) continue;
        const far = Math.max(track.start[i] - t, t - track.end[i], 0) * 1e6 + track.end[i] - track.start[i];
        if (far < least) { least = far; best = { lane, track, i }; }
      }
      return best;
    }
  }
  return null;
}

function show(start, end) {
  const whole = range.end - range.start, wide = Math.min(Math.max(end - start, MIN_SPAN_S), whole);
  const middle = (start + end) / 2, from = Math.min(Math.max(middle - wide / 2, range.start), range.end - wide);
  view = { start: from, end: from + wide };
  later();
}

const zoom = (t, factor) => show(t - (t - view.start) * factor, t + (view.end - t) * factor);
const move = (part) => show(view.start + part * (view.end - view.start), view.end + part * (view.end - view.start));
const fit = () => show(range.start, range.end);

lanesCanvas.addEventListener("wheel", (event) => {
  const overflows = stage.clientHeight > lanesCanvas.clientHeight + 1;
  if (Math.abs(event.deltaX) > Math.abs(event.deltaY) || event.shiftKey) {
    event.preventDefault();
    move((event.deltaX || event.deltaY) / plotWidth());
  } else if (!overflows || event.ctrlKey || event.metaKey) {
    event.preventDefault();
    zoom(toTime(event.offsetX), Math.exp(Math.min(Math.max(event.deltaY, -240), 240) * 0.002));
  }
}, { passive: false });

let held = null;
lanesCanvas.addEventListener("pointerdown", (event) => {
  held = { x: event.clientX, y: event.clientY, ...view };
  lanesCanvas.setPointerCapture(event.pointerId);
  lanesCanvas.classList.add("held");
});
lanesCanvas.addEventListener("pointermove", (event) => {
  if (held) {
    const shift = ((event.clientX - held.x) / plotWidth()) * (held.end - held.start);
    show(held.start - shift, held.end - shift);
    if (event.pointerType !== "touch") window.scrollBy(0, held.y - event.clientY);
    held.y = event.clientY;
    showTip(event, null);
    return;
  }
  const found = find(event);
  if (found?.track !== hovered?.track || found?.i !== hovered?.i) { hovered = found; later(); }
  showTip(event, found);
});
for (const name of ["pointerup", "pointercancel"]) {
  lanesCanvas.addEventListener(name, () => { held = null; lanesCanvas.classList.remove("held"); });
}
lanesCanvas.addEventListener("pointerleave", () => { hovered = null; tip.hidden = true; later(); });
lanesCanvas.addEventListener("dblclick", fit);

let brush = null;
overview.addEventListener("pointerdown", (event) => { brush = overTime(event.offsetX); overview.setPointerCapture(event.pointerId); });
overview.addEventListener("pointermove", (event) => {
  if (brush === null) return;
  const t = overTime(event.offsetX);
  if (Math.abs(overX(t) - overX(brush)) > 4) show(Math.min(t, brush), Math.max(t, brush));
});
overview.addEventListener("pointerup", (event) => {
  const t = overTime(event.offsetX), half = (view.end - view.start) / 2;
  if (brush !== null && Math.abs(overX(t) - overX(brush)) <= 4) show(t - half, t + half);
  brush = null;
});
overview.addEventListener("dblclick", fit);

window.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const middle = (view.start + view.end) / 2;
  const actions = { w: () => zoom(middle, 0.7), s: () => zoom(middle, 1 / 0.7), a: () => move(-0.2), d: () => move(0.2), 0: fit,
    ArrowLeft: () => move(-0.2), ArrowRight: () => move(0.2), "+": () => zoom(middle, 0.7), "-": () => zoom(middle, 1 / 0.7) };
  actions[event.key]?.();
});
window.addEventListener("scroll", later, { passive: true });
window.addEventListener("resize", () => { drawAll(); fillAbout(); });
$("fit").onclick = fit;
$("theme").onclick = () => setTheme(!document.documentElement.classList.contains("dark"));

// -- live, where the page came from a server --------------------------------------------------------------------------

async function refresh() {
  try {
    const address = new URL(location.href);
    address.searchParams.set("format", "json");
    const response = await fetch(address);
    if (!response.ok) throw new Error(`HTTP ${response.status}`);
    const follows = view.end >= range.end - 1e-9, wide = view.end - view.start, isWhole = wide >= (range.end - range.start) * 0.999;
    const then = data.now_s;
    load(await response.json());
    nameList = [];
    hovered = null;
    chosen = -1;
    chooseColors();
    fillLegend();
    const shift = data.now_s - then;
    if (isWhole) fit(); else if (follows) show(range.end - wide, range.end); else show(view.start - shift, view.end - shift);
    drawAll();
    fillAbout();
  } catch (error) {
    $("about").textContent = `the server did not answer: ${error.message}`;
  }
  if (liveTimer) liveTimer = setTimeout(refresh, LIVE_MS);
}

if (location.protocol.startsWith("http")) {
  $("live").hidden = false;
  $("live").onclick = () => {
    clearTimeout(liveTimer);
    liveTimer = liveTimer ? 0 : setTimeout(refresh, 0);
    $("live").classList.toggle("on", liveTimer !== 0);
  };
}

load(JSON.parse($("data").textContent));
view = { ...range };
setTheme(location.hash === "#dark" || (location.hash !== "#light" && matchMedia("(prefers-color-scheme: dark)").matches));
fillAbout();
