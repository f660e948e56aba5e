// The status page: reads server-sent events from status/events and draws what they tell. No libraries.
// Everything from the server is put in as text, never as HTML.

const ROOT = document.body.dataset.root;
const KEEP_SECONDS = 300;
const KEY = "lightvllm-api-key";
const SILENCE_MS = 10_000; // events come every second: after this long the connection is taken for lost
const RETRY_MS = [500, 1000, 2000, 4000];

const $ = (id) => document.getElementById(id);

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// ---- numbers ----

const grouped = new Intl.NumberFormat("en");

function count(value) {
  if (value < 100_000) return grouped.format(value);
  const units = [[1e9, "B"], [1e6, "M"], [1e3, "k"]];
  const [size, unit] = units.find(([each]) => value >= each);
  return (value / size).toPrecision(3) + " " + unit;
}

function rate(value) {
  return value >= 10 ? grouped.format(Math.round(value)) : String(Number(value.toFixed(1)));
}

function duration(seconds) {
  if (seconds === 0) return "0 s";
  if (seconds < 0.001) return Math.round(seconds * 1e6) + " µs";
  if (seconds < 1) return Number((seconds * 1000).toPrecision(seconds < 0.1 ? 2 : 3)) + " ms";
  if (seconds < 100) return Number(seconds.toFixed(seconds < 10 ? 1 : 0)) + " s";
  if (seconds < 5400) return Math.round(seconds / 60) + " min";
  return seconds < 172_800 ? (seconds / 3600).toFixed(1) + " h" : Math.round(seconds / 86_400) + " d";
}

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) [value, unit] = [value / 1024, unit + 1];
  return (value >= 100 || unit === 0 ? Math.round(value) : value.toFixed(1)) + " " + units[unit];
}

const percent = (share) => (share * 100).toFixed(share > 0 && share < 0.1 ? 1 : 0) + " %";

// ---- charts ----

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 132, LEFT = 44, RIGHT = 6, TOP = 8, BOTTOM = 18;

function svg(tag, attributes = {}) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** The smallest of 1, 2, 2.5 and 5 times a power of ten that is not below `value`. */
function niceTop(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((each) => each * power).find((each) => each >= value * 0.999);
}

class Chart {
  /** `series`: [name, (sample) => number or null]; `format`: of values; `least`: what the axis shows at least. */
  constructor(title, series, format, { least = 1, most = Infinity } = {}) {
    Object.assign(this, { title, series, format, least, most, pointed: null });
    this.node = element("figure", "card chart");
    this.node.style.margin = "0";
    const legend = element("figcaption", "legend");
    legend.append(element("h3", "", title));
    this.values = series.map(([name], index) => {
      const entry = element("span", "series" + (index ? " second" : ""), name + " ");
      const value = element("b", "", "–");
      entry.append(value);
      legend.append(entry);
      return value;
    });
    this.svg = svg("svg", { role: "img" });
    this.svg.addEventListener("pointermove", (event) => {
      this.pointed = event.clientX - this.svg.getBoundingClientRect().left;
      this.draw(samples);
    });
    this.svg.addEventListener("pointerleave", () => {
      this.pointed = null;
      this.draw(samples);
    });
    this.node.append(legend, this.svg);
  }

  draw(all) {
    const width = this.svg.clientWidth || 400;
    const end = all.length ? all[all.length - 1].at : 0;
    const span = Math.min(KEEP_SECONDS, Math.max(30, all.length ? end - all[0].at : 0));
    const lines = this.series.map(([, of]) => all.map((sample) => [sample.at, of(sample)]).filter(([, y]) => y !== null));
    const highest = Math.max(this.least, ...lines.flat().map(([, y]) => y));
    const top = Math.min(this.most, niceTop(highest));
    const x = (at) => LEFT + (width - LEFT - RIGHT) * (1 - (end - at) / span);
    const y = (value) => HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value / top);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const parts = [];
    for (const share of [0, 0.5, 1]) {
      const at = y(top * share);
      parts.push(svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: at, y2: at }));
      parts.push(label(LEFT - 6, at + 4, this.format(top * share), "end"));
    }
    parts.push(label(LEFT, HEIGHT - 3, duration(span) + " ago", "start"), label(width - RIGHT, HEIGHT - 3, "now", "end"));
    lines.forEach((line, index) => {
      if (!line.length) return;
      const path = line.map(([at, value]) => `${x(at).toFixed(1)} ${y(value).toFixed(1)}`).join("L");
      if (!index) {
        const [from, to] = [x(line[0][0]).toFixed(1), x(line[line.length - 1][0]).toFixed(1)];
        parts.push(svg("path", { class: "area", d: `M${from} ${y(0)}L${path}L${to} ${y(0)}Z` }));
      }
      parts.push(svg("path", { class: index ? "second" : "first", d: "M" + path }));
    });
    let shown = lines.map((line) => line[line.length - 1]);
    if (this.pointed !== null && all.length) {
      const at = end - span * (1 - (this.pointed - LEFT) / (width - LEFT - RIGHT));
      shown = lines.map((line) => line.reduce((best, each) =>
        !best || Math.abs(each[0] - at) < Math.abs(best[0] - at) ? each : best, undefined));
      const nearest = shown.find(Boolean);
      if (nearest) parts.push(svg("line", { class: "cursor", x1: x(nearest[0]), x2: x(nearest[0]), y1: TOP, y2: HEIGHT - BOTTOM }));
    }
    shown.forEach((point, index) => put(this.values[index], point ? this.format(point[1]) : "–"));
    this.svg.setAttribute("aria-label", this.title + ": " + this.series.map(([name], index) =>
      `${name} ${this.values[index].textContent}`).join(", "));
    this.svg.replaceChildren(...parts);
  }
}

function label(x, y, text, anchor) {
  const made = svg("text", { x, y, "text-anchor": anchor });
  made.textContent = text;
  return made;
}

const charts = [
  new Chart("Tokens per second", [["generated", (s) => s.generated], ["prompt", (s) => s.prompt]], rate, { least: 10 }),
  new Chart("Sequences", [["running", (s) => s.running], ["waiting", (s) => s.waiting]], rate, { least: 4 }),
  new Chart("KV cache in use", [["held", (s) => s.cache]], percent, { least: 0.1, most: 1 }),
  new Chart("Time to first token", [["mean", (s) => s.firstToken]], duration, { least: 0.01 }),
  new Chart("Time per output token", [["mean", (s) => s.perToken]], duration, { least: 0.01 }),
  new Chart("One step", [["whole", (s) => s.step], ["executor", (s) => s.overhead]], duration, { least: 0.001 }),
];

let samples = [];
let before = null;

/** Turn two states, a moment apart, into what happened per second between them. */
function sample(now) {
  const last = before;
  before = now;
  if (!now.stats) return;
  // A server that has begun anew counts from zero.
  if (!last?.stats || now.stats.total_steps < last.stats.total_steps || now.uptime_seconds < last.uptime_seconds) return;
  const seconds = now.time - last.time;
  if (seconds <= 0) return;
  const more = (name) => now.stats[name] - last.stats[name];
  const mean = (of, total, number) => {
    const times = now[of][number] - last[of][number];
    return times > 0 ? (now[of][total] - last[of][total]) / times : null;
  };
  samples.push({
    at: now.time,
    generated: more("total_generation_tokens") / seconds,
    prompt: more("total_prompt_tokens") / seconds,
    running: now.stats.num_running,
    waiting: now.stats.num_waiting,
    cache: now.stats.kv_cache_usage,
    firstToken: mean("requests", "first_token_seconds", "first_tokens"),
    perToken: mean("requests", "interval_seconds", "intervals"),
    step: mean("stats", "total_step_seconds", "total_steps"),
    overhead: mean("stats", "total_executor_seconds", "total_steps"),
  });
  samples = samples.filter((each) => each.at > now.time - KEEP_SECONDS);
}

// ---- the parts of the page ----

const HEALTH = { ready: "● ready", dead: "✕ dead", stopped: "○ stopped" };

function facts(state) {
  const { engine } = state;
  const told = [["version", state.version], ["up", duration(state.uptime_seconds)]];
  if (engine) {
    told.unshift(
      ["executor", engine.executor],
      ["layout", `TP ${engine.tensor_parallel_size} × PP ${engine.pipeline_parallel_size}`],
      ["precision", engine.dtype],
      ["context", grouped.format(engine.max_model_len)],
    );
    told.push(["started in", duration(engine.start_seconds)]);
  }
  pairs($("facts"), told);
}

function pairs(list, told) {
  if (list.children.length !== told.length) {
    list.replaceChildren(...told.map(() => {
      const each = element("div");
      each.append(element("dt"), element("dd"));
      return each;
    }));
  }
  told.forEach(([name, value, bad], index) => {
    const [dt, dd] = list.children[index].children;
    put(dt, name);
    put(dd, value);
    list.children[index].dataset.bad = Boolean(bad);
  });
}

let drawnRanks = "";

function topology(state) {
  const { ranks, engine } = state;
  $("topology-section").hidden = !ranks.length;
  const drawn = JSON.stringify(ranks);
  if (!ranks.length || drawn === drawnRanks) return;
  drawnRanks = drawn;
  const ready = ranks.filter((rank) => rank.health === "ready").length;
  const nodes = new Set(ranks.map((rank) => rank.node).filter(Boolean)).size;
  put($("topology-note"), `${ready} of ${ranks.length} ready` + (nodes > 1 ? `, on ${nodes} nodes` : "")
    + (engine.tensor_parallel_size > 1 ? "; columns share layers (tensor parallel)" : "")
    + (engine.pipeline_parallel_size > 1 ? "; rows follow each other (pipeline stages)" : ""));
  const most = Math.max(1, ...ranks.map((rank) => rank.parameter_bytes));
  const stages = [];
  for (const rank of ranks) (stages[rank.pp_rank] ??= []).push(rank);
  $("topology").replaceChildren(...stages.filter(Boolean).map((stage, index) => {
    const row = element("div", "stage");
    row.style.setProperty("--columns", stage.length);
    row.classList.toggle("named", stages.length > 1);
    if (stages.length > 1) row.append(element("span", "name", `stage ${index}`));
    row.append(...stage.sort((a, b) => a.tp_rank - b.tp_rank).map(box));
    return row;
  }));
}

function box(rank) {
  const made = element("article", "rank");
  made.dataset.health = rank.health;
  made.dataset.rank = rank.rank;
  const top = element("div", "top");
  top.append(element("span", "", `rank ${rank.rank}`), element("span", "health", HEALTH[rank.health] ?? rank.health));
  made.append(top);
  if (rank.reason) made.append(element("p", "reason", rank.reason));
  const where = [rank.device, rank.node, rank.pid ? `pid ${rank.pid}` : "", rank.address].filter(Boolean).join(" · ");
  made.append(element("p", "where", where || rank.worker));
  if (rank.parameter_bytes) made.append(element("p", "memory", `${bytes(rank.parameter_bytes)} of weights`));
  return made;
}

function totals(state) {
  const { requests, stats } = state;
  const told = [
    ["requests finished", count(requests.stop + requests.length)],
    ["being answered", count(requests.in_flight)],
    ["clients gone", count(requests.abort)],
    ["timed out", count(requests.timeout), requests.timeout > 0],
    ["failed", count(requests.error), requests.error > 0],
    ["refused", count(requests.refused), requests.refused > 0],
  ];
  if (stats) {
    told.push(
      ["prompt tokens", count(stats.total_prompt_tokens + stats.total_prefix_cache_hits)],
      ["generated tokens", count(stats.total_generation_tokens)],
      ["prefix cache hits", stats.total_prefix_cache_queries
        ? percent(stats.total_prefix_cache_hits / stats.total_prefix_cache_queries) : "–"],
      ["preemptions", count(stats.total_preemptions)],
      ["mean step", stats.total_steps ? duration(stats.total_step_seconds / stats.total_steps) : "–"],
      ["executor per step", stats.total_steps ? duration(stats.total_executor_seconds / stats.total_steps) : "–"],
    );
  }
  pairs($("totals"), told);
}

let drawnErrors = null;

function errors(state) {
  const drawn = JSON.stringify(state.errors);
  if (drawn === drawnErrors) return;
  drawnErrors = drawn;
  $("errors").replaceChildren(...(state.errors.length ? state.errors.map((error) => {
    const line = element("li");
    const when = element("time", "", new Date(error.time * 1000).toLocaleTimeString());
    when.dateTime = new Date(error.time * 1000).toISOString();
    const what = element("div", "", error.message + (error.count > 1 ? ` (${error.count} times)` : ""));
    if (error.request_id) what.append(element("div", "id", `request ${error.request_id}`));
    line.append(when, what);
    return line;
  }) : [element("li", "none", "None.")]));
}

function banner(kind, text) {
  const node = $("banner");
  node.hidden = !text;
  node.dataset.kind = kind;
  put(node, text ?? "");
}

function phase(name, text) {
  $("phase").dataset.phase = name;
  put($("phase"), text);
}

function show(state) {
  const { phase: now, reason } = state;
  $("main").hidden = false;
  $("main").classList.remove("stale");
  put($("model"), state.model || "lightvllm");
  document.title = (now === "ready" ? "" : `${now}: `) + (state.model || "lightvllm");
  phase(now, now);
  if (now === "failed") banner("bad", capital(reason ?? "the engine has failed"));
  else if (now === "stopping") banner("warn", capital(reason));
  else banner("", null);
  $("starting").hidden = now !== "starting";
  if (now === "starting") put($("progress"), capital(reason));
  $("live").hidden = !state.stats;
  facts(state);
  topology(state);
  sample(state);
  if (state.stats) for (const chart of charts) chart.draw(samples);
  totals(state);
  errors(state);
}

const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

// ---- the connection ----

const stored = () => { try { return sessionStorage.getItem(KEY); } catch { return null; } };
const store = (key) => { try { key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY); } catch { /* kept below */ } };
let key = stored();

/** One connection: calls `show` with each event; returns when it has ended, false if a key is needed. */
async function listen() {
  const ending = new AbortController();
  let silence = setTimeout(() => ending.abort(), SILENCE_MS);
  try {
    const answer = await fetch(ROOT + "status/events", {
      headers: key ? { Authorization: `Bearer ${key}` } : {}, cache: "no-store", signal: ending.signal,
    });
    if (answer.status === 401 || answer.status === 403) return false;
    if (!answer.ok) throw new Error((await answer.json().catch(() => null))?.error?.message ?? `HTTP ${answer.status}`);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return true;
      clearTimeout(silence);
      silence = setTimeout(() => ending.abort(), SILENCE_MS);
      const events = (text + value).split("\n\n");
      text = events.pop();
      const last = events.filter((event) => event.startsWith("data: ")).pop(); // older ones are past
      if (last) {
        failures = 0;
        show(JSON.parse(last.slice(6)));
      }
    }
  } finally {
    clearTimeout(silence);
  }
}

let failures = 0;

async function stay() {
  for (;;) {
    let why = "";
    try {
      if (!(await listen())) {
        askForKey();
        return;
      }
    } catch (error) {
      if (error instanceof Error && error.name === "Error") why = ` (${error.message})`;
    }
    phase("lost", "no connection");
    banner("bad", `No connection to the server${why}. Trying again …`);
    document.title = "no connection";
    $("main").classList.add("stale");
    const wait = RETRY_MS[Math.min(failures, RETRY_MS.length - 1)];
    failures += 1;
    await new Promise((done) => setTimeout(done, wait));
  }
}

function askForKey() {
  // A link cannot carry a key.
  for (const link of document.querySelectorAll("footer [data-needs-key]")) link.hidden = true;
  $("key-wrong").hidden = !key;
  key = null;
  store(null);
  $("main").hidden = true;
  banner("", null);
  phase("unknown", "API key needed");
  $("key-form").hidden = false;
  $("key").value = "";
  $("key").focus();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  store(key);
  $("key-form").hidden = true;
  phase("unknown", "connecting");
  stay();
});

$("charts").append(...charts.map((chart) => chart.node));
window.addEventListener("resize", () => charts.forEach((chart) => chart.draw(samples)));
stay();
