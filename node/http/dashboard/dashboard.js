"use strict";
// Shows what /api/v1 says. Names come from peers and manifests: they go into the page as text only, never as markup.

const STATUS_EVERY = 2000, SWARM_EVERY = 10000; // milliseconds
const $ = (id) => document.getElementById(id);
let before = null; // the status before the latest one, for rates
let coverage = null;

const size = (bytes) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) { bytes /= 1024; unit += 1; }
  return `${bytes >= 100 || unit === 0 ? Math.round(bytes) : bytes.toFixed(1)} ${units[unit]}`;
};
const time = (seconds) =>
  seconds >= 1 ? `${seconds.toPrecision(3)} s` : seconds >= 1e-3 ? `${(seconds * 1e3).toPrecision(3)} ms`
    : seconds > 0 ? `${(seconds * 1e6).toPrecision(3)} µs` : "–";
const age = (seconds) => {
  for (const [unit, length] of [["d", 86400], ["h", 3600], ["min", 60]])
    if (seconds >= length) return `${(seconds / length).toFixed(1)} ${unit}`;
  return `${Math.round(seconds)} s`;
};
const share = (part, other) => (part + other ? `${(100 * part / (part + other)).toFixed(1)} %` : "–");
const number = (value) => value.toLocaleString("en");

function element(kind, text, ...children) {
  const made = document.createElement(kind);
  made.textContent = text;
  made.append(...children);
  return made;
}

function bar(value, max) {
  const made = document.createElement("progress");
  made.max = Math.max(max, 1);
  made.value = Math.min(value, made.max);
  return made;
}

function table(into, header, rows) {
  const head = element("tr", "", ...header.map((name) => element("th", name)));
  const body = rows.map((row) => element("tr", "", ...row.map((cell) =>
    cell instanceof Node ? element("td", "", cell) : element("td", String(cell)))));
  $(into).replaceChildren(head, ...body);
}

function card(value, ...lines) {
  const made = element("div", "", element("b", value), ...lines.map((line) => element("span", line)));
  made.className = "card";
  return made;
}

function rate(now, pick) { // per second since the last look
  if (!before || before.started !== now.started || now.updated <= before.updated) return 0;
  return Math.max(0, (pick(now) - pick(before)) / (now.updated - before.updated));
}

function showStatus(now) {
  document.title = `${now.modelName} · moehive`;
  $("model").textContent = now.modelName;
  $("phase").textContent = now.phase;
  $("who").textContent =
    `node ${now.peer}, up ${age(now.updated - now.started)}, on ${now.device}; model ${now.modelId}`;
  const { requests, transfers, experts, peers } = now, ram = experts.tiers.find((tier) => tier.tier === "ram");
  $("cards").replaceChildren(
    card(`${rate(now, (s) => s.requests.done).toFixed(1)}/s`, `requests answered, ${number(requests.done)} so far`),
    card(`${number(Math.round(rate(now, (s) => s.requests.rows)))}/s`, "rows computed: a token through an expert"),
    card(time(requests.latency.p50), `median answer; p99 ${time(requests.latency.p99)}`),
    card(String(requests.waiting), "requests wait" + (requests.expectedWait ? `, for ${time(requests.expectedWait)}` : "")),
    card(share(ram.hits, ram.misses), "of uses found in memory"),
    card(`${size(rate(now, (s) => s.transfers.sentBytes))}/s`, `sent, ${size(transfers.sentBytes)} so far`),
    card(`${size(rate(now, (s) => s.transfers.receivedBytes))}/s`, `received, ${size(transfers.receivedBytes)} so far`),
    card(String(peers.known), `peers announce the model, ${peers.asking} ask this one now`));
  table("tiers", ["tier", "found there", "of uses", "loads p50", "p99", "moved", "in use", "budget", ""],
    [...experts.tiers.map((tier) => [
      tier.tier, number(tier.hits), "misses" in tier ? share(tier.hits, tier.misses) : "–",
      tier.latency ? time(tier.latency.p50) : "–", tier.latency ? time(tier.latency.p99) : "–",
      "movedBytes" in tier ? size(tier.movedBytes) : "–",
      ...("budgetBytes" in tier
        ? [size(tier.residentBytes), size(tier.budgetBytes), bar(tier.residentBytes, tier.budgetBytes)] : ["–", "–", ""]),
    ]), ...(now.disk ? [["fetched files", number(now.disk.objects), "–", "–", "–", "–", size(now.disk.usedBytes),
      size(now.disk.budgetBytes), bar(now.disk.usedBytes, now.disk.budgetBytes)]] : [])]);
  $("layers").replaceChildren(...experts.layers.map((layer) => element("div", `${layer.layer}  `,
    bar(layer.hits, layer.hits + layer.misses), element("span", `  ${share(layer.hits, layer.misses)}`))));
  before = now;
}

function showCoverage(found) {
  coverage = found;
  const every = found.layers.flatMap((layer) => layer.holders);
  const missing = every.filter((holders) => holders === 0).length;
  const own = found.layers.reduce((sum, layer) => sum + layer.own.length, 0);
  $("summary").textContent = `${number(every.length)} experts in ${found.layers.length} layers; this node holds `
    + `${number(own)}. ` + (missing ? `${number(missing)} are held by nobody: a client has to fetch and compute them itself.`
    : `Every one is held; the rarest by ${number(Math.min(...every))}.`);
  draw();
}

function cellSize() { // pixels: as large as fits, but large enough to point at
  const columns = Math.max(1, ...coverage.layers.map((layer) => layer.holders.length));
  return Math.max(6, Math.min(26, Math.floor($("grid").parentElement.clientWidth / columns)));
}

function draw() {
  if (!coverage) return;
  const canvas = $("grid"), cell = cellSize(), scale = window.devicePixelRatio || 1, { layers } = coverage;
  const width = cell * Math.max(1, ...layers.map((layer) => layer.holders.length)), height = cell * layers.length;
  Object.assign(canvas, { width: width * scale, height: height * scale });
  Object.assign(canvas.style, { width: `${width}px`, height: `${height}px` });
  const style = getComputedStyle(document.documentElement), pen = canvas.getContext("2d");
  const colours = ["--none", "--one", "--two", "--more"].map((name) => style.getPropertyValue(name));
  pen.scale(scale, scale);
  pen.strokeStyle = style.getPropertyValue("--own");
  layers.forEach((layer, row) => {
    layer.holders.forEach((holders, column) => {
      pen.fillStyle = colours[Math.min(holders, 3)];
      pen.fillRect(column * cell, row * cell, cell - 1, cell - 1);
    });
    for (const column of layer.own) pen.strokeRect(column * cell + 0.5, row * cell + 0.5, cell - 2, cell - 2);
  });
}

function point(event) {
  const cell = cellSize(), layer = coverage?.layers[Math.floor(event.offsetY / cell)];
  const expert = Math.floor(event.offsetX / cell), holders = layer?.holders[expert];
  $("cell").textContent = holders === undefined ? "" : `layer ${layer.layer}, expert ${expert}: ${holders} `
    + `${holders === 1 ? "peer" : "peers"}${layer.own.includes(expert) ? ", this node too" : ""}`;
}

function showPeers(found) {
  const hidden = found.known - found.peers.length;
  $("known").textContent = `${number(found.known)} announce this model${hidden ? `; ${number(hidden)} more not shown` : ""}.`;
  table("peers", ["peer", "experts", "dense part", "whole model", "loading"], found.peers.map((peer) => [
    peer.peer + (peer.self ? " (this node)" : ""), number(peer.experts), peer.skeleton ? "yes" : "–",
    peer.complete ? "yes" : "–", peer.loading ? "yes" : "–"]));
}

async function look(path, show) {
  try {
    const answer = await fetch(path, { signal: AbortSignal.timeout(10000) });
    const said = await answer.json();
    $("trouble").hidden = answer.ok;
    if (answer.ok) show(said);
    else {
      $("phase").textContent = said.status;
      $("trouble").textContent = `Not yet: the node ${said.reason}.`;
    }
  } catch (error) {
    $("trouble").hidden = false;
    $("trouble").textContent = `The node does not answer (${error.name}). Trying again.`;
  }
}

async function forever(path, show, every) {
  for (;;) {
    if (!document.hidden) await look(path, show);
    await new Promise((done) => { setTimeout(done, every); });
  }
}

window.addEventListener("resize", draw);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
$("grid").addEventListener("mousemove", point);
forever("api/v1/status", showStatus, STATUS_EVERY);
forever("api/v1/coverage", showCoverage, SWARM_EVERY);
forever("api/v1/peers", showPeers, SWARM_EVERY);
