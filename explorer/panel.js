// The panel beside the map: fills what page.html lays out. Text goes in as text, never as HTML.
import { LINES, bandColor } from "./plot.js";
import { describeArea, describePlace, geographic, mapCoordinates, middle } from "./geo.js";
import { BACKGROUNDS, FULL_NAMES, OVERLAYS, WHY_NOT } from "./layers.js";
import { classesOf, isOutside, isThere, legendOf, partOf, quantityAt } from "./layers.js";

const RARE = ["quantity", "applicability"];

export const byId = (id) => document.getElementById(id);

// A new element with properties and children (elements or text).
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

function icon(name) {
  const [svg, use] = [document.createElementNS(SVG, "svg"), document.createElementNS(SVG, "use")];
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

function swatch(color) {
  const element = make("i", { className: "swatch" });
  element.style.background = color;
  return element;
}

const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)} %`;

// ---- layers -------------------------------------------------------------------------------------

function fillChoice(box, names, chosen, scene, found, choose) {
  // few maps have these, so that nothing is said where there is none
  const shown = Object.entries(names).filter(
    ([key]) => !RARE.includes(key) || isThere(scene, key, found),
  );
  const rows = shown.map(([key, name]) => {
    const there = isThere(scene, key, found);
    const input = make("input", {
      type: "radio",
      name: box.id,
      value: key,
      checked: key === chosen,
      disabled: !there,
    });
    input.addEventListener("change", () => choose(key));
    const full = FULL_NAMES[key] ?? name;
    input.setAttribute("aria-label", full);
    const title = there ? full : `${full}: ${WHY_NOT[key]}`;
    return make("label", { title }, input, make("span", {}, name));
  });
  box.replaceChildren(...rows);
}

// The choice of layers and the legend of what is on top.
export function showLayers(app) {
  const { scene, found, view } = app;
  fillChoice(byId("backgrounds"), BACKGROUNDS, view.background, scene, found, app.setBackground);
  fillChoice(byId("overlays"), OVERLAYS, view.overlay, scene, found, app.setOverlay);
  byId("falseColorHint").hidden = view.background !== "falseColor";
  byId("opacity").value = view.opacity;
  byId("opacityOut").value = `${view.opacity} %`;
  const onTop = view.hidden ? "none" : view.overlay;
  const legend = legendOf(scene, onTop, found, view.from);
  showLegend(legend ?? legendOf(scene, view.background, found));
}

function showLegend(legend) {
  byId("legend").hidden = !legend;
  if (!legend) return;
  const parts = [make("b", {}, legend.title)];
  if (legend.gradient) {
    const bar = make("div", { className: "ramp" });
    bar.style.background = legend.gradient;
    const ends = make(
      "div",
      { className: "ends" },
      make("span", {}, legend.low),
      make("span", {}, legend.high),
    );
    parts.push(bar, ends);
  }
  for (const { name, color } of legend.entries ?? []) {
    parts.push(make("div", { className: "entry" }, swatch(color), make("span", {}, name)));
  }
  byId("legendParts").replaceChildren(...parts);
  byId("fromBox").hidden = legend.from === undefined;
  byId("from").value = legend.from ?? 0;
}

// ---- pixel --------------------------------------------------------------------------------------

// Where a pixel is, in one line for the map's corner.
export function whereLine(scene, { row, column }) {
  const center = [middle(scene, row), middle(scene, column)];
  const place = geographic(scene, ...center);
  const pixel = `row ${row * scene.stride}, column ${column * scene.stride}`;
  return place ? `${pixel} · ${describePlace(place)}` : pixel;
}

// A CRS without a short name is a long text.
const shortName = (crs) => (crs.length <= 12 ? crs : "Map x, y");

// What is known of a pixel: [[what, text, colour or none]].
export function pixelFacts(app, { row, column }) {
  const { scene, found } = app;
  const [i, number] = [row * scene.width + column, scene.first + row * scene.width + column];
  const center = [middle(scene, row), middle(scene, column)];
  const [map, place] = [mapCoordinates(scene, ...center), geographic(scene, ...center)];
  const rows = [["Row, column", `${row * scene.stride}, ${column * scene.stride}`]];
  if (map) rows.push([shortName(scene.place.crs), `${map[0].toFixed(1)}, ${map[1].toFixed(1)}`]);
  if (place) rows.push(["WGS 84", describePlace(place)]);
  const { classes, confidence, quantity, labels, count } = scene.layers;
  const classRow = (what, key, code, sure = "") => {
    const one = classesOf(scene, key)[code];
    rows.push([what, (code ? (one?.name ?? `class ${code}`) : "none") + sure, one?.color]);
  };
  if (classes) {
    const sure = confidence && classes[i] ? ` (${percent(confidence[i] / 255)})` : "";
    classRow("Class map", "classes", classes[i], sure);
  }
  const far = scene.layers.applicability?.[i];
  if (far) rows.push(["Like the training", isOutside(far) ? "no: outside" : "yes"]);
  if (quantity?.[i]) rows.push([scene.quantity.label, quantityAt(scene, quantity[i])]);
  if (labels) classRow("Tile's label", "labels", labels[i]);
  if (found.prediction) {
    const own = app.labels.classOf(found.prediction.codes[found.prediction.classes[number]]);
    const sure = percent(found.prediction.confidence[number] / 255);
    rows.push(["Your map", own ? `${own.name} (${sure})` : "none", own?.color]);
  }
  const label = app.labels.classOf(app.labels.byPixel.get(number)?.code);
  if (label) rows.push(["Your label", label.name, label.color]);
  if (count) rows.push(["Clear dates", String(count[i])]);
  if (!app.hasData(number)) rows.push(["Embedding", "no data: too few clear dates"]);
  return rows;
}

export function showPixel(app) {
  const { pixel, series, ndvi, scene, others } = app;
  byId("pixelEmpty").hidden = Boolean(pixel);
  byId("pixelBox").hidden = !pixel;
  if (!pixel) return;
  const rows = pixelFacts(app, pixel).flatMap(([what, text, color]) => [
    make("dt", {}, what),
    make("dd", {}, ...(color ? [swatch(color)] : []), make("span", {}, text)),
  ]);
  byId("pixelFacts").replaceChildren(...rows);
  byId("yearBox").hidden = !series;
  byId("noYear").hidden = Boolean(series);
  if (!series) return;
  const curves = series.bands.map((band, i) => [band.name, bandColor(band.name, i)]);
  if (ndvi) curves.unshift(["NDVI", "var(--text)"]);
  const chips = curves.map(([name, color]) => {
    const chip = make("button", { type: "button" }, swatch(color), name);
    chip.setAttribute("aria-pressed", String(!app.hidden.has(name)));
    chip.addEventListener("click", () => app.toggleCurve(name));
    return chip;
  });
  byId("curves").replaceChildren(...chips);
  const years = [scene, ...others].map(({ title }, i) =>
    make("span", {}, make("i", { className: LINES[i].name }), title),
  );
  byId("years").replaceChildren(...years);
  byId("years").hidden = !others.length;
}

// The threshold's slider is finer the nearer it is to 1, where most similarities are.
export const fromSlider = (place) => 1 - 2 * (1 - place) ** 3;
const toSlider = (threshold) => 1 - Math.cbrt((1 - threshold) / 2);

export function showSimilarity(app) {
  const { scene, found } = app;
  byId("threshold").value = toSlider(found.threshold);
  byId("thresholdOut").value = found.threshold.toFixed(3);
  if (!found.similarity) return (byId("similarFacts").textContent = "");
  let [above, valid] = [0, 0];
  for (const value of partOf(scene, found.similarity)) {
    if (value === value) valid++;
    if (value >= found.threshold) above++;
  }
  const area = `${describeArea(scene, above)} of this map (${percent(above / (valid || 1), 1)})`;
  const line = `${area} have a cosine similarity of ${found.threshold.toFixed(3)} or more.`;
  byId("similarFacts").textContent = line;
}

// Which class the proposed pixel has: the line over the map.
export function showProposal({ proposals, labels }) {
  byId("proposal").hidden = !proposals.going;
  const key = (name) => make("kbd", {}, name);
  const classes = labels.classes.slice(0, 9).map(({ name, color }, i) => {
    return make("span", {}, key(String(i + 1)), swatch(color), name);
  });
  const others = [make("span", {}, key("N"), "another"), make("span", {}, key("Esc"), "end")];
  byId("proposal").replaceChildren("Which class?", ...classes, ...others);
}

// ---- classes ------------------------------------------------------------------------------------

function classRow(app, code, index) {
  const pick = make("input", { type: "radio", name: "class", title: `Choose (${index + 1})` });
  pick.addEventListener("change", () => app.chooseClass(code));
  const tint = make("input", { type: "color", title: "Colour" });
  tint.addEventListener("change", () => app.labels.editClass(code, { color: tint.value }));
  const text = make("input", { type: "text", maxLength: 60, spellcheck: false });
  text.setAttribute("aria-label", "Name of the class");
  text.addEventListener("change", () => app.renameClass(code, text.value.trim()));
  text.addEventListener("focus", () => app.chooseClass(code, false));
  text.addEventListener("keydown", (event) => event.key === "Enter" && byId("map").focus());
  const number = make("span", { className: "count", title: "Clicks or strokes / labelled pixels" });
  const remove = make(
    "button",
    { type: "button", title: "Delete the class and its labels" },
    icon("close"),
  );
  remove.addEventListener("click", () => app.labels.removeClass(code));
  return make("li", {}, pick, tint, text, number, remove);
}

// Rows stay where they are as long as there are the same classes, and so does the focus.
export function showClasses(app) {
  const { labels, scene } = app;
  const [box, counts] = [byId("classes"), labels.counts()];
  const codes = labels.classes.map((one) => one.code);
  if (box.dataset.codes !== String(codes)) {
    box.dataset.codes = String(codes);
    box.replaceChildren(...codes.map((code, i) => classRow(app, code, i)));
  }
  labels.classes.forEach(({ code, name, color }, i) => {
    const [pick, tint, text, number, remove] = box.children[i].children;
    const { pixels, clicks } = counts.get(code);
    tint.value = color;
    if (text !== document.activeElement) text.value = name; // not over what is being typed
    number.textContent = pixels === clicks ? `${clicks}` : `${clicks} / ${pixels} px`;
    pick.setAttribute("aria-label", `Choose ${name}`);
    tint.setAttribute("aria-label", `Colour of ${name}`);
    remove.setAttribute("aria-label", `Delete ${name}`);
  });
  markClass(app);
  byId("classesEmpty").hidden = labels.classes.length > 1 && labels.byPixel.size > 0;
  byId("takeClasses").hidden = !Object.keys(scene.classes).length;
  byId("drawTen").hidden = !scene.layers.labels;
  byId("clearLabels").disabled = !labels.byPixel.size;
  byId("undo").disabled = !labels.done.length;
  byId("redo").disabled = !labels.undone.length;
}

// Mark the class that labels go to.
export function markClass(app) {
  app.labels.classes.forEach((one, i) => {
    const row = byId("classes").children[i];
    row?.classList.toggle("chosen", one.code === app.code);
    if (row) row.firstChild.checked = one.code === app.code;
  });
}

// Let the name of the last class be typed.
export function nameClass() {
  byId("classes").lastChild.querySelector("input[type=text]").select();
}

// ---- the page's own map -------------------------------------------------------------------------

// Pixels of each class on the scene: [{name, color, code, pixels}].
export function classPixels(app) {
  const { prediction } = app.found;
  const counts = new Uint32Array(256);
  for (const number of partOf(app.scene, prediction.classes)) counts[number]++;
  return prediction.codes.map((code, i) => ({
    ...app.labels.classOf(code),
    code,
    pixels: counts[i],
  }));
}

export function showMap(app) {
  const { prediction } = app.found;
  for (const id of ["savePicture", "saveGeotiff", "saveMap"]) byId(id).disabled = !prediction;
  for (const id of ["saveLabels", "saveTileJson", "saveGeojson"])
    byId(id).disabled = !app.labels.byPixel.size;
  if (!prediction) {
    byId("areas").replaceChildren();
    byId("score").replaceChildren();
    byId("learned").textContent = "";
    return;
  }
  showLearned(app, prediction.about);
  const rows = classPixels(app);
  const total = rows.reduce((sum, row) => sum + row.pixels, 0) || 1;
  const bars = rows.map(({ name, color, pixels }) => {
    const fill = make("i");
    fill.style.width = percent(pixels / total, 1).replace(" ", "");
    fill.style.background = color;
    const track = make("div", { className: "track" }, fill);
    const [area, share] = [describeArea(app.scene, pixels), percent(pixels / total, 1)];
    const number = (text) => make("span", { className: "number" }, text);
    return make(
      "div",
      { className: "area" },
      swatch(color),
      make("span", {}, name),
      number(area),
      number(share),
      track,
    );
  });
  byId("areas").replaceChildren(...bars);
}

// How the map was made, and that it is not of the labels as they are now.
function showLearned({ data, labels, view }, { pixels, seconds, version }) {
  const all = data.scales.length.toLocaleString("en");
  const old = !view.auto && version !== labels.version;
  byId("learned").textContent =
    `${all} px from ${pixels} labelled in ${seconds.toFixed(2)} s` +
    (old ? ". The labels have changed since then: Map now makes the map anew." : "");
}

// Wilson's interval of a share at 95 %.
function interval(right, clicks) {
  const [p, z] = [right / clicks, 1.96];
  const middle = p + (z * z) / (2 * clicks);
  const half = z * Math.sqrt((p * (1 - p)) / clicks + (z * z) / (4 * clicks * clicks));
  const whole = 1 + (z * z) / clicks;
  return [(middle - half) / whole, (middle + half) / whole];
}

// The score of the held-out clicks, {clicks, right, perClass}.
export function showScore(app, score) {
  const box = byId("score");
  if (!score.clicks) {
    const hint = "No score yet: a class needs two clicks or more, so that some can be held out.";
    return box.replaceChildren(make("p", { className: "hint" }, hint));
  }
  const { right, clicks } = score;
  const [low, high] = interval(right, clicks);
  const round = (value) => +value.toFixed(1);
  const range = `95 % interval ${percent(low)} to ${percent(high)}`;
  const line = `of held-out clicks right (${round(right)} of ${clicks}; ${range})`;
  const rows = score.perClass.map((one, i) =>
    make(
      "tr",
      {},
      make("td", {}, app.labels.classOf(app.found.prediction.codes[i])?.name ?? ""),
      make("td", {}, one.clicks ? `${round(one.right)} of ${one.clicks}` : "too few"),
    ),
  );
  const head = make("tr", {}, make("th", {}, "Class"), make("th", {}, "right"));
  const how =
    "Each fifth of the clicks was held out once, and predicted by a model of the others. " +
    "Clicks close to each other make the score too high.";
  box.replaceChildren(
    make(
      "p",
      {},
      make("b", {}, percent(right / clicks)),
      " ",
      make("span", { className: "hint" }, line),
    ),
    make("table", {}, head, ...rows),
    make("p", { className: "hint" }, how),
  );
}
