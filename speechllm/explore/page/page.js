// The page of `speechllm explore`. All that it shows is in REPORT (data.js, made by report.py); no text of it becomes
// HTML. Opened as a file it may read nothing else, which is why the data is a script, and waveforms are in it.
"use strict";
(() => {
const report = globalThis.REPORT;
const utterances = report.utterances;
const systems = report.systems;
const ROW = 28; // height of a row of the list, in pixels, as in page.css
const TABS = systems.length ? ["overview", "utterances", "errors", "data"] : ["data", "utterances"];
const state = { tab: null, sort: null, descending: true, shown: [], current: -1, filters: {} };
const byId = (id) => document.getElementById(id);

function el(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children.filter((child) => child !== null));
  return node;
}
const percent = (value) => (Number.isFinite(value) ? `${(100 * value).toFixed(2)}%` : "-");
const number = (value, digits = 0) => (Number.isFinite(value) ? value.toFixed(digits) : "-");
const errorsOf = (u, system) => u.systems[system].errors.reduce((a, b) => a + b, 0);
const ratio = (errors, units) => (units ? errors / units : errors ? Infinity : 0);
const rateOf = (u, system) => ratio(errorsOf(u, system), u.units);
const speed = (u, unit) => (u.duration ? u[unit] / u.duration : NaN);
const hypothesis = (u, system) =>
  u.systems[system].pairs.map((p) => (Array.isArray(p) ? p[1] : p)).filter((p) => p !== null).join(report.joined);
const kindOf = (pair) => (!Array.isArray(pair) ? "right" : pair[0] === null ? "ins" : pair[1] === null ? "del" : "sub");

// ---- tables of error rates ---------------------------------------------------------------------------------------

function table(headings, rows) {
  const isNumber = (value) => typeof value === "string" && /^[-+]?[\d.]+%?$|^-$/.test(value);
  const numeric = (i) => rows.length && rows.every(({ cells }) => isNumber(cells[i]));
  const classes = headings.map((_, i) => (numeric(i) ? "number" : ""));
  const body = rows.map(({ cells, open }) => {
    const row = el("tr", {}, ...cells.map((value, i) => el("td", { className: classes[i] }, value)));
    if (open) {
      Object.assign(row, { className: "link", tabIndex: 0, onclick: open });
      row.onkeydown = (event) => { if (event.key === "Enter") open(); };
    }
    return row;
  });
  const head = headings.map((heading, i) => el("th", { className: classes[i] }, heading));
  return el("table", {}, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body));
}

function groupTable(by, groups) {
  const worst = Math.max(...groups.map((g) => groupRate(g.members, 0)).filter(Number.isFinite), 1e-9);
  const headings = [by, "utterances", report.units];
  for (const name of systems.length > 1 ? ["first ", "second "] : systems.length ? [""] : [])
    headings.push(`${name}${report.rate}`, "95% from", "to", "ins", "del", "sub");
  if (systems.length) headings.push("");
  const rows = groups.map((group) => {
    const members = group.members.map((i) => utterances[i]);
    const cells = [group.name, `${members.length}`, `${members.reduce((sum, u) => sum + u.units, 0)}`];
    systems.forEach((_, s) => {
      const [low, high] = group.bounds[s] ?? [NaN, NaN];
      cells.push(percent(groupRate(group.members, s)), percent(low), percent(high));
      for (let kind = 0; kind < 3; kind++)
        cells.push(`${members.reduce((sum, u) => sum + u.systems[s].errors[kind], 0)}`);
    });
    if (systems.length) {
      const width = `${Math.min(groupRate(group.members, 0) / worst, 1) * 8}rem`;
      const bar = el("div", { className: "bar" });
      bar.style.width = width;
      cells.push(bar);
    }
    return { cells, open: () => filter({ group: { name: `${by}: ${group.name}`, members: new Set(group.members) } }) };
  });
  return table(headings, rows);
}

function groupRate(members, system) {
  const sum = (value) => members.reduce((total, i) => total + value(utterances[i]), 0);
  return ratio(sum((u) => errorsOf(u, system)), sum((u) => u.units));
}

function showOverview() {
  const parts = report.comparison ? [el("h2", {}, "comparison"), el("pre", {}, report.comparison)] : [];
  for (const [by, groups] of Object.entries(report.groups))
    parts.push(el("h2", {}, `${report.rate} by ${by}`), groupTable(by, groups));
  byId("overview").replaceChildren(...parts);
}

// ---- the list ----------------------------------------------------------------------------------------------------

const COLUMNS = [
  { name: "id", width: "minmax(8rem, 3fr)", value: (u) => u.id },
  { name: "set", width: "minmax(3rem, 1fr)", value: (u) => u.set, used: () => report.groups.set.length > 2 },
  { name: "seconds", width: "4.8rem", digits: 2, value: (u) => u.duration ?? NaN },
  ...systems.flatMap((_, s) => {
    const name = systems.length > 1 ? ` ${s + 1}` : "";
    const confidence = (u) => u.systems[s].confidence ?? NaN;
    return [
      { name: `errors${name}`, width: "5rem", digits: 0, value: (u) => errorsOf(u, s) },
      { name: report.rate, width: "4.8rem", show: percent, value: (u) => rateOf(u, s), used: () => systems.length < 2 },
      { name: `sure${name}`, width: "4.2rem", digits: 2, value: confidence,
        used: () => utterances.some((u) => Number.isFinite(confidence(u))) },
    ];
  }),
  { name: "change", width: "4.5rem", digits: 0, used: () => systems.length > 1,
    value: (u) => errorsOf(u, 1) - errorsOf(u, 0) },
  { name: `${report.units}/s`, width: "4.6rem", digits: 1, value: (u) => speed(u, "units"), used: () => !systems.length },
  { name: systems.length ? "reference" : "text", width: "minmax(8rem, 6fr)", value: (u) => u.ref },
].filter((column) => column.used?.() ?? true);
const GRID = COLUMNS.map((column) => column.width).join(" ");
const isNumeric = (column) => "digits" in column || "show" in column;

function showHeadings() {
  byId("columns").style.gridTemplateColumns = GRID;
  byId("columns").replaceChildren(...COLUMNS.map((column) => {
    const sorted = state.sort === column;
    const button = el("button", {
      type: "button",
      className: isNumeric(column) ? "number" : "",
      onclick: () => sortBy(column, sorted ? !state.descending : isNumeric(column)),
    }, column.name + (sorted ? (state.descending ? " \u2193" : " \u2191") : ""));
    if (sorted) button.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
    return button;
  }));
}

function sortBy(column, descending) {
  Object.assign(state, { sort: column, descending });
  refresh();
}

// Which utterances are shown, and in what order; what is not known comes last.
function refresh() {
  const chosen = utterances[state.shown[state.current]];
  const { text, group, error, range } = state.filters;
  const words = text?.toLowerCase();
  const matches = (u, i) =>
    (!words || searchable(u).includes(words)) &&
    (!group || group.members.has(i)) &&
    (!error || errorAt(u, error) >= 0) &&
    (!range || (range.value(u) >= range.low && (range.last ? range.value(u) <= range.high : range.value(u) < range.high)));
  const keys = utterances.map(state.sort.value);
  const sign = state.descending ? -1 : 1;
  const rank = (a, b) => (a < b ? -sign : a > b ? sign : 0);
  const unknown = (i) => Number.isNaN(keys[i]);
  state.shown = utterances.flatMap((u, i) => (matches(u, i) ? [i] : []))
    .sort((a, b) => unknown(a) - unknown(b) || rank(keys[a], keys[b]) || a - b);
  byId("rows").style.height = `${state.shown.length * ROW}px`;
  byId("count").value = `${state.shown.length} of ${utterances.length}`;
  showHeadings();
  showChips();
  const place = chosen ? state.shown.findIndex((i) => utterances[i] === chosen) : -1;
  select(Math.max(place, 0));
}

function searchable(u) {
  u.searched ??= [u.id, u.ref, ...systems.map((_, s) => hypothesis(u, s))].join("\n").toLowerCase();
  return u.searched;
}

// Only the rows that can be seen are there.
function showRows() {
  const list = byId("list");
  const first = Math.max(Math.floor(list.scrollTop / ROW) - 4, 0);
  const last = Math.min(Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 4, state.shown.length);
  const rows = [];
  for (let place = first; place < last; place++) {
    const u = utterances[state.shown[place]];
    const cells = COLUMNS.map((column) => {
      const value = column.value(u);
      const shown = column.show ? column.show(value) : "digits" in column ? number(value, column.digits) : value;
      return el("span", { className: isNumeric(column) ? "number" : "", title: column.show ? "" : shown }, shown);
    });
    const row = el("div", { className: "row", id: `row-${place}`, onclick: () => select(place) }, ...cells);
    row.style.top = `${place * ROW}px`;
    row.style.gridTemplateColumns = GRID;
    row.setAttribute("role", "option");
    row.setAttribute("aria-selected", place === state.current);
    rows.push(row);
  }
  byId("rows").replaceChildren(...rows);
}

function select(place) {
  state.current = Math.min(Math.max(place, 0), state.shown.length - 1);
  const list = byId("list");
  const top = state.current * ROW;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + ROW > list.scrollTop + list.clientHeight) list.scrollTop = top + ROW - list.clientHeight;
  list.setAttribute("aria-activedescendant", `row-${state.current}`);
  showRows();
  showDetail(utterances[state.shown[state.current]]);
}

function filter(filters) {
  Object.assign(state.filters, filters);
  refresh();
  select(0);
  openTab("utterances");
}

function showChips() {
  const { group, error, range } = state.filters;
  const chip = (name, what) => el("button", { type: "button", title: "show all again",
    onclick: () => { state.filters[what] = null; refresh(); } }, `${name} \u00d7`);
  byId("chips").replaceChildren(...[
    group ? chip(group.name, "group") : null,
    error ? chip(`${error.ref ?? "\u2205"} \u2192 ${error.hyp ?? "\u2205"}`, "error") : null,
    range ? chip(range.name, "range") : null,
  ].filter(Boolean));
}

// ---- one utterance -----------------------------------------------------------------------------------------------

const player = el("audio", { controls: true, preload: "none" });
let playing = null; // the utterance that the player has, and how to draw its waveform

function showDetail(u) {
  player.pause();
  playing = null;
  if (!u) {
    byId("detail").replaceChildren("no utterance");
    return;
  }
  const facts = [u.set, u.language, u.speaker, u.duration ? `${u.duration.toFixed(2)} s` : null,
    u.duration ? `${number(speed(u, "units"), 1)} ${report.units}/s` : null];
  byId("detail").replaceChildren(
    el("h2", {}, u.id),
    el("div", { className: "facts" }, facts.filter(Boolean).join(" \u00b7 ")),
    ...(u.audio ? playerOf(u) : []),
    ...(systems.length ? u.systems.flatMap((_, s) => resultOf(u, s)) : [el("p", {}, u.ref)]),
  );
  playing?.draw();
}

function playerOf(u) {
  const { src, start, end, peaks } = u.audio;
  const canvas = el("canvas", { width: 800, height: 144 });
  const heights = Uint8Array.from(atob(peaks), (c) => c.charCodeAt(0));
  player.src = start > 0 ? `${src}#t=${start},${end}` : src;
  const draw = () => {
    const context = canvas.getContext("2d");
    const style = getComputedStyle(document.documentElement);
    const played = (player.currentTime - start) / (end - start);
    context.clearRect(0, 0, canvas.width, canvas.height);
    heights.forEach((height, i) => {
      context.fillStyle = style.getPropertyValue(i / heights.length < played ? "--accent" : "--bar");
      const high = Math.max((height / 255) * canvas.height, 2);
      context.fillRect((i / heights.length) * canvas.width, (canvas.height - high) / 2, canvas.width / heights.length, high);
    });
  };
  canvas.onclick = (event) => {
    player.currentTime = start + (event.offsetX / canvas.clientWidth) * (end - start);
    player.play();
  };
  playing = { start, end, draw };
  const words = u.systems.find((system) => system.words.length)?.words ?? [];
  const times = el("div", { className: "times" }, ...words.map(([word, from, , confidence]) => {
    const span = el("span", { title: `${from.toFixed(2)} s, confidence ${number(confidence, 2)}` }, word);
    span.style.left = `${(100 * from) / (end - start)}%`;
    return span;
  }));
  return [player, canvas, ...(words.length ? [times] : [])];
}

player.ontimeupdate = () => {
  if (playing && player.currentTime >= playing.end) player.pause();
};
player.onplay = () => {
  const step = () => {
    playing?.draw();
    if (!player.paused) requestAnimationFrame(step);
  };
  step();
};

function resultOf(u, s) {
  const system = u.systems[s];
  const [ins, del, sub] = system.errors;
  const title = systems.length > 1 ? `${s + 1}: ${systems[s]}` : "reference and hypothesis";
  const summary = `${report.rate} ${percent(rateOf(u, s))}: ${ins} ins, ${del} del, ${sub} sub of ${u.units} ${report.units}`;
  const sure = Number.isFinite(system.confidence) ? `, confidence ${system.confidence.toFixed(2)}` : "";
  const unsure = new Set(system.words.filter((w) => w[3] < 0.5).map((w) => w[0].toLowerCase()));
  const nodes = system.pairs.map((pair) => {
    const [ref, hyp] = Array.isArray(pair) ? pair : [pair, pair];
    const heard = el("span", { className: unsure.has(hyp?.toLowerCase()) ? "hyp unsure" : "hyp" }, hyp ?? "");
    const node = el("span", { className: `pair ${kindOf(pair)}` }, el("span", { className: "ref" }, ref ?? ""), heard);
    if (state.filters.error && isError(pair, state.filters.error)) node.classList.add("found");
    return node;
  });
  const parts = [el("h2", {}, title), el("div", { className: "facts" }, summary + sure),
    el("div", { className: report.joined ? "aligned" : "aligned joined" }, ...nodes)];
  for (const note of system.notes) parts.push(el("div", { className: "facts" }, `note: ${note}`));
  for (const hypotheses of system.nbest) {
    const rows = hypotheses.map(([text, confidence], i) => ({ cells: [`${i + 1}`, number(confidence, 2), text] }));
    parts.push(table(["n-best", "sure", ""], rows));
    parts.at(-1).querySelectorAll("td:last-child").forEach((cell) => cell.classList.add("wide"));
  }
  return parts;
}

// ---- frequent errors ---------------------------------------------------------------------------------------------

const isError = (pair, error) => Array.isArray(pair) && pair[0] === error.ref && pair[1] === error.hyp;
function errorAt(u, error) {
  const found = error.system === undefined ? u.systems : [u.systems[error.system]];
  return Math.max(...found.map((system) => system.pairs.findIndex((pair) => isError(pair, error))));
}

function frequentErrors() {
  const counts = new Map();
  utterances.forEach((u) => u.systems.forEach((system, s) => system.pairs.forEach((pair, place) => {
    if (!Array.isArray(pair)) return;
    const key = JSON.stringify(pair);
    if (!counts.has(key)) {
      const example = { pairs: system.pairs, place };
      counts.set(key, { ref: pair[0], hyp: pair[1], kind: kindOf(pair), counts: systems.map(() => 0), example });
    }
    counts.get(key).counts[s] += 1;
  })));
  return [...counts.values()].sort((a, b) => Math.max(...b.counts) - Math.max(...a.counts));
}

function exampleOf({ pairs, place }) {
  const said = pairs.slice(Math.max(place - 4, 0), place + 5).map((p, i) => {
    const [ref, hyp] = Array.isArray(p) ? p : [p, p];
    return i === Math.min(place, 4) ? `[${ref ?? "\u2205"} \u2192 ${hyp ?? "\u2205"}]` : ref ?? "";
  });
  return said.filter(Boolean).join(report.joined);
}

const KINDS = { sub: "substitutions", del: "deletions", ins: "insertions" };
const SHOWN_ERRORS = 100;

function showErrors() {
  const all = frequentErrors();
  const parts = Object.entries(KINDS).map(([kind, name]) => {
    const errors = all.filter((error) => error.kind === kind);
    const headings = [...(systems.length > 1 ? ["first", "second"] : ["count"]), "reference", "hypothesis", "example"];
    const rows = errors.slice(0, SHOWN_ERRORS).map((error) => ({
      cells: [...error.counts.map(String), error.ref ?? "\u2205", error.hyp ?? "\u2205", exampleOf(error.example)],
      open: () => filter({ error: { ref: error.ref, hyp: error.hyp } }),
    }));
    return el("div", {}, el("h2", {}, `${name}: ${errors.length} kinds`), table(headings, rows));
  });
  byId("errors").replaceChildren(el("p", { className: "facts" }, "a line opens the utterances that have this error"),
    el("div", { className: "columns" }, ...parts));
}

// ---- data --------------------------------------------------------------------------------------------------------

const MEASURES = [
  { name: "seconds", digits: 2, value: (u) => u.duration ?? NaN },
  { name: `${report.units} per second`, digits: 2, value: (u) => speed(u, "units") },
  { name: "characters per second", digits: 2, value: (u) => speed(u, "characters") },
  { name: report.units, digits: 0, value: (u) => u.units },
];
const BINS = 50;
const EXTREMES = 10;

function showData() {
  const hours = (members) => members.reduce((sum, i) => sum + (utterances[i].duration ?? 0), 0) / 3600;
  const parts = [];
  for (const [by, groups] of Object.entries(report.groups)) {
    const rows = groups.map((group) => ({
      cells: [group.name, `${group.members.length}`, number(hours(group.members), 3),
        `${group.members.reduce((sum, i) => sum + utterances[i].units, 0)}`, `${vocabulary(group.members)}`],
      open: () => filter({ group: { name: `${by}: ${group.name}`, members: new Set(group.members) } }),
    }));
    const headings = [by, "utterances", "hours", report.units, `different ${report.units}`];
    parts.push(el("h2", {}, by), table(headings, rows));
  }
  for (const measure of MEASURES) parts.push(...distribution(measure));
  byId("data").replaceChildren(...parts);
}

function vocabulary(members) {
  const found = new Set();
  for (const i of members) for (const unit of utterances[i].ref.split(report.joined)) if (unit) found.add(unit);
  return found.size;
}

function distribution(measure) {
  const known = utterances.map((u, i) => [measure.value(u), i]).filter(([value]) => Number.isFinite(value));
  if (!known.length) return [];
  known.sort((a, b) => a[0] - b[0]);
  const [low, high] = [known[0][0], known.at(-1)[0]];
  const width = (high - low) / BINS || 1;
  const counts = Array(BINS).fill(0);
  for (const [value] of known) counts[Math.min(Math.floor((value - low) / width), BINS - 1)] += 1;
  const most = Math.max(...counts);
  const bars = counts.map((count, i) => {
    const from = low + i * width;
    const name = `${measure.name}: ${number(from, measure.digits)} to ${number(from + width, measure.digits)}`;
    const range = { name, value: measure.value, low: from, high: i === BINS - 1 ? high : from + width, last: i === BINS - 1 };
    const bar = el("button", { type: "button", title: `${name}: ${count}`, onclick: () => filter({ range }) });
    bar.style.height = `${count ? Math.max((100 * count) / most, 1) : 0}%`;
    return bar;
  });
  const quantile = (q) => number(known[Math.round(q * (known.length - 1))][0], measure.digits);
  const extreme = (found) => found.map(([value, i]) => ({
    cells: [number(value, measure.digits), utterances[i].id, utterances[i].ref.slice(0, 80)],
    open: () => filter({ group: { name: utterances[i].id, members: new Set([i]) } }),
  }));
  return [
    el("h2", {}, measure.name),
    el("div", { className: "facts" }, `1% ${quantile(0.01)} \u00b7 median ${quantile(0.5)} \u00b7 99% ${quantile(0.99)}`),
    el("div", { className: "chart" }, ...bars),
    el("div", { className: "axis" }, el("span", {}, number(low, measure.digits)), el("span", {}, number(high, measure.digits))),
    el("div", { className: "columns" },
      table(["lowest", "id", ""], extreme(known.slice(0, EXTREMES))),
      table(["highest", "id", ""], extreme(known.slice(-EXTREMES).reverse()))),
  ];
}

// ---- the page ----------------------------------------------------------------------------------------------------

const SHOW = { overview: showOverview, errors: showErrors, data: showData };
const made = new Set();

function openTab(tab) {
  state.tab = tab;
  for (const name of TABS) {
    byId(name).hidden = name !== tab;
    byId(`tab-${name}`).setAttribute("aria-selected", name === tab);
  }
  if (SHOW[tab] && !made.has(tab)) {
    made.add(tab);
    SHOW[tab]();
  }
  if (tab === "utterances") {
    select(state.current); // now it has a height
    byId("list").focus({ preventScroll: true });
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("speechllm-theme", theme);
  } catch { /* where files may store nothing, it is chosen anew each time */ }
  playing?.draw();
}

function savedTheme() {
  try {
    return localStorage.getItem("speechllm-theme");
  } catch {
    return null;
  }
}

const page = () => Math.max(Math.floor(byId("list").clientHeight / ROW) - 1, 1);
const MOVES = {
  j: () => 1, k: () => -1, ArrowDown: () => 1, ArrowUp: () => -1, PageDown: page, PageUp: () => -page(),
  Home: () => -Infinity, End: () => Infinity,
};

document.onkeydown = (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target === byId("search");
  const key = event.key;
  if (key === "Escape") {
    state.filters = {};
    byId("search").value = "";
    byId("list").focus();
    refresh();
  } else if (typing) {
    if (key === "Enter" || key === "ArrowDown") byId("list").focus();
    else return;
  } else if (key === "/") {
    openTab("utterances");
    byId("search").focus();
  } else if (key === "t") toggleTheme();
  else if (TABS[key - 1]) openTab(TABS[key - 1]);
  else if (state.tab === "utterances" && MOVES[key]) select(state.current + MOVES[key]());
  else if (state.tab === "utterances" && key === " " && event.target === byId("list")) {
    if (player.paused && playing) play();
    else player.pause();
  } else return;
  event.preventDefault();
};

function play() {
  if (player.currentTime < playing.start || player.currentTime >= playing.end) player.currentTime = playing.start;
  player.play();
}

function toggleTheme() {
  setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
}

function start() {
  const dark = globalThis.matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = savedTheme() ?? (dark ? "dark" : "light");
  byId("theme").onclick = toggleTheme;
  byId("tabs").append(...TABS.map((tab) => {
    const button = el("button", { type: "button", id: `tab-${tab}`, onclick: () => openTab(tab) }, tab);
    button.setAttribute("role", "tab");
    return button;
  }));
  byId("totals").append(...(systems.length
    ? systems.map((name, s) => el("div", { title: name }, `${report.rate} ${report.totals[s]}  ${name}`))
    : [`${utterances.length} utterances`]));
  byId("search").oninput = () => { state.filters.text = byId("search").value; refresh(); };
  byId("list").onscroll = showRows;
  globalThis.onresize = () => { if (state.tab === "utterances") showRows(); };
  state.sort = COLUMNS.find((column) => column.name.startsWith(systems.length ? "errors" : "seconds"));
  refresh();
  openTab(TABS[0]);
}
start();
})();
