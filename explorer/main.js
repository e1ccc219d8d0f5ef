// Opens the page: reads the data, starts the workers, and binds the controls to the app.
import { App } from "./app.js";
import { readFacts, readScenes } from "./data.js";
import { MapView } from "./map.js";
import { LABEL_FIRST } from "./next.js";
import { byId, fromSlider, make, showClasses, whereLine } from "./panel.js";
import { Pool } from "./pool.js";

const MAX_WORKERS = 8;
const NARROW_SCREEN = matchMedia("(max-width: 760px)");
const SHOWN = 5000; // milliseconds that a message stays

function say(text) {
  byId("status").textContent = text;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => (byId("status").textContent = ""), SHOWN);
}

function chooseTheme(theme) {
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem("explore:theme", theme);
  } catch {
    // a browser that keeps nothing asks its system again next time
  }
}

function startTheme() {
  let kept = null;
  try {
    kept = localStorage.getItem("explore:theme");
  } catch {
    // as above
  }
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const known = kept === "dark" || kept === "light";
  document.documentElement.dataset.theme = known ? kept : dark ? "dark" : "light";
}

// ---- controls -----------------------------------------------------------------------------------

const on = (id, event, run) => byId(id).addEventListener(event, run);

function bindMap(app) {
  app.map = new MapView(byId("map"), {
    hover: (pixel) => (byId("where").textContent = pixel ? whereLine(app.scene, pixel) : ""),
    pick: (row, column) => app.pick(row, column),
    stroke: (phase, row, column) => app.stroke(phase, row, column),
    drawn: () => {
      const { width, text } = app.map.bar(120);
      byId("bar").firstChild.style.width = `${width}px`;
      byId("bar").lastChild.textContent = text;
    },
  });
  on("zoomIn", "click", () => app.map.zoomBy(1.5));
  on("zoomOut", "click", () => app.map.zoomBy(1 / 1.5));
  on("fit", "click", () => app.map.fit());
  on("undo", "click", () => app.labels.undo());
  on("redo", "click", () => app.labels.redo());
  const tools = [...document.querySelectorAll("[data-tool]")];
  for (const button of tools)
    button.addEventListener("click", () => app.setTool(button.dataset.tool));
  app.toolChanged = (tool) => {
    for (const one of tools) one.setAttribute("aria-pressed", String(one.dataset.tool === tool));
    byId("map").classList.toggle("brushing", tool === "brush" || tool === "erase");
  };
  app.setTool("look");
}

function bindPixel(app) {
  on("opacity", "input", (event) => app.change({ opacity: Number(event.target.value) }));
  on("from", "input", (event) => app.setFrom(Number(event.target.value)));
  on("threshold", "input", (event) => app.setThreshold(fromSlider(Number(event.target.value))));
  on("centred", "change", (event) => {
    app.view.centred = event.target.checked;
    app.thresholdChosen = false; // cosines about another origin are other numbers
    if (app.pixel) app.findSimilar();
  });
  const year = byId("year");
  year.addEventListener("pointermove", (event) => app.pointAtDate(year, event.offsetX));
  year.addEventListener("pointerleave", () => app.pointAtDate(year, null));
  new ResizeObserver(() => app.drawYear()).observe(year);
}

function setBrush(app, radius) {
  app.view.brush = Math.max(0, Math.min(20, radius));
  byId("brush").value = app.view.brush;
  byId("brushOut").value = `${2 * app.view.brush + 1} px`;
  if (app.map.tool !== "look") app.setTool(app.map.tool);
  app.keep();
}

function bindClasses(app) {
  on("addClass", "click", () => app.addClass());
  on("takeClasses", "click", () => app.takeClasses());
  on("drawTen", "click", () => app.drawTen());
  on("clearLabels", "click", () => app.labels.clear());
  on("brush", "input", (event) => setBrush(app, Number(event.target.value)));
}

// The classifier's controls as the view says.
function showMethod(app) {
  for (const radio of document.getElementsByName("method"))
    radio.checked = radio.value === app.view.method;
  byId("kBox").hidden = app.view.method !== "nearest";
  byId("k").value = byId("kOut").value = app.view.k;
}

function bindLearning(app) {
  const learnNew = (change) => {
    Object.assign(app.view, change);
    showMethod(app);
    app.keep();
    if (app.labels.byPixel.size) app.learnSoon();
  };
  for (const radio of document.getElementsByName("method")) {
    radio.addEventListener("change", () => learnNew({ method: radio.value }));
  }
  on("k", "input", (event) => learnNew({ k: Number(event.target.value) }));
  on("auto", "change", (event) => (app.view.auto = event.target.checked));
  on("learn", "click", () => (app.training() ? app.learn() : say(LABEL_FIRST)));
  on("labelNext", "click", () => app.proposals.next());
}

function bindFiles(app) {
  for (const id of [
    "saveLabels",
    "saveTileJson",
    "saveGeojson",
    "savePicture",
    "saveGeotiff",
    "saveMap",
    "saveSession",
  ]) {
    on(id, "click", () => app[id]());
  }
  on("loadSession", "click", () => byId("sessionFile").click());
  on("sessionFile", "change", async (event) => {
    const [file] = event.target.files;
    event.target.value = "";
    if (!file) return;
    try {
      const { taken, left } = app.restore(JSON.parse(await file.text()));
      showMethod(app);
      const rest = left ? `; ${left} have no pixel in this page` : "";
      say(`${taken} labels loaded${rest}.`);
    } catch (error) {
      const foreign = error instanceof SyntaxError;
      say(foreign ? "This file is no JSON: wanted what Save session wrote." : error.message);
    }
  });
}

function bindTabs(app) {
  const tabs = [...document.querySelectorAll("[data-tab]")];
  app.showTab = (id) => {
    for (const tab of tabs) {
      const chosen = tab.dataset.tab === id;
      tab.setAttribute("aria-selected", String(chosen));
      tab.tabIndex = chosen ? 0 : -1;
      byId(tab.dataset.tab).hidden = !chosen;
    }
    // where the panel is low, the layers make room
    if (NARROW_SCREEN.matches) byId("tabs").parentElement.scrollTop = byId("layers").offsetHeight;
  };
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => app.showTab(tab.dataset.tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: tabs.length - 1 }[event.key];
      if (!step) return;
      const next = tabs[(i + step) % tabs.length];
      app.showTab(next.dataset.tab);
      next.focus();
    });
  });
  app.showTab("pixelPage");
}

function bindFrame(app) {
  const select = byId("scene");
  select.append(...app.scenes.map((scene, i) => make("option", { value: i }, scene.title)));
  byId("sceneBox").hidden = app.scenes.length < 2;
  select.addEventListener("change", () => {
    app.showScene(Number(select.value));
    showFacts(app);
  });
  on("theme", "click", () => {
    chooseTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
    app.drawYear();
  });
  on("helpButton", "click", () => byId("help").showModal());
  on("helpClose", "click", () => byId("help").close());
  document.addEventListener("keydown", (event) => pressKey(app, event));
  addEventListener("pagehide", () => app.storage.flush());
}

// ---- keys ---------------------------------------------------------------------------------------

const KEYS = {
  v: (app) => app.setTool("look"),
  l: (app) => app.setTool("label"),
  b: (app) => app.setTool("brush"),
  e: (app) => app.setTool("erase"),
  h: (app) => app.change({ hidden: !app.view.hidden }),
  m: (app) => app.setOverlay("map"),
  s: (app) => app.setOverlay("similarity"),
  n: (app) => app.proposals.next(),
  escape: (app) => app.proposals.end(),
  "+": (app) => app.map.zoomBy(1.5),
  "=": (app) => app.map.zoomBy(1.5),
  "-": (app) => app.map.zoomBy(1 / 1.5),
  0: (app) => app.map.fit(),
  "[": (app) => setBrush(app, app.view.brush - 1),
  "]": (app) => setBrush(app, app.view.brush + 1),
  "?": () => byId("help").showModal(),
};

function pressKey(app, event) {
  if (event.target.matches("input[type=text], select") || byId("help").open) return;
  const key = event.key.toLowerCase();
  if ((event.ctrlKey || event.metaKey) && (key === "z" || key === "y")) {
    event.preventDefault();
    if (key === "y" || event.shiftKey) app.labels.redo();
    else app.labels.undo();
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const numbered = app.labels.classes[Number(key) - 1];
  if (numbered && app.proposals.going) app.proposals.answer(numbered.code);
  else if (numbered) app.chooseClass(numbered.code);
  else KEYS[key]?.(app);
}

// ---- opening ------------------------------------------------------------------------------------

// Facts of the scene that is shown, in the header and under Save.
function showFacts({ facts, scene }) {
  const line = describePage(facts, scene);
  byId("facts").textContent = line;
  const page = `Page ${facts.hash.slice(0, 8)}. Nothing leaves this file.`;
  byId("about").textContent = `${line}, as int8 with one scale a pixel. ${page}`;
}

function describePage({ embedding }, scene) {
  const { dimensions, of, variance } = embedding;
  const thinned =
    scene.stride > 1
      ? `, one of ${scene.stride} rows and columns of ${scene.fullHeight} x ${scene.fullWidth}`
      : "";
  const share = `${(100 * variance).toFixed(1)} % of the variance`;
  const held = `${dimensions} of ${of} dimensions hold ${share}`;
  return `${scene.height} x ${scene.width} pixels${thinned} · ${held}`;
}

function restoreKept(app) {
  const kept = app.storage.read();
  if (!kept) return;
  try {
    app.restore(kept);
  } catch {
    say("The last session in this browser cannot be read; the page starts anew.");
  }
}

async function open() {
  startTheme();
  const facts = readFacts();
  byId("title").textContent = facts.title;
  const data = await readScenes(facts, (share) => (byId("progress").value = share));
  const count = Math.max(1, Math.min(MAX_WORKERS, navigator.hardwareConcurrency || 2));
  const pool = new Pool(byId("worker").textContent, count);
  pool.load(data.values, data.scales, data.size);
  const app = (window.explore = new App(facts, data, pool, say));
  for (const bind of [
    bindTabs,
    bindMap,
    bindPixel,
    bindClasses,
    bindLearning,
    bindFiles,
    bindFrame,
  ])
    bind(app);
  app.showScene(0);
  showFacts(app);
  restoreKept(app);
  showMethod(app);
  setBrush(app, app.view.brush);
  showClasses(app);
  app.showTab(app.labels.classes.length ? "labelsPage" : "pixelPage");
  byId("tabs").parentElement.scrollTop = 0;
  byId("veil").hidden = true;
  app.times.open = performance.now();
}

open().catch((error) => {
  byId("progress").hidden = true;
  byId("veilText").textContent =
    `This page could not be opened (${error.message}). ` +
    "It needs a browser of 2023 or later, and memory for the map.";
});
