// The state of the page and what can be done with it; panel.js and map.js show it.
import { geojson, classTable, download, labelMap, mapPicture, npy } from "./files.js";
import { geotiff, whyNoGeotiff } from "./geotiff.js";
import { Labels, brushPixels, chooseLabels } from "./labels.js";
import { isThere, mapCodes, paintLayer } from "./layers.js";
import { Proposals } from "./next.js";
import {
  classPixels,
  markClass,
  nameClass,
  showClasses,
  showLayers,
  showMap,
  showPixel,
  showScore,
  showSimilarity,
} from "./panel.js";
import { concatenate } from "./pool.js";
import { ndviOf, seriesAt, vectorOf } from "./data.js";
import { Storage, readSession, toSession } from "./session.js";

const MAX_TRAINING = 4000; // labelled pixels that the softmax learns from
const MAX_NEAREST_WORK = 1.5e8; // pixels times labelled pixels that k nearest compares
const SHARE_SHOWN = 0.1; // of the pixels that are above the first threshold
const MAX_THRESHOLD = 0.999;
const MAX_OTHERS = 2; // other years in the plot, each with a line of its own
const PATIENCE = 120; // milliseconds after a label until the map is made again

export class App {
  // data: of readScenes; pool: of workers; say: shows a line of text for a while.
  constructor(facts, data, pool, say) {
    Object.assign(this, { facts, data, pool, say, scenes: data.scenes, scene: data.scenes[0] });
    this.labels = new Labels(() => this.labelsChanged());
    this.storage = new Storage(facts.hash);
    this.found = { similarity: null, threshold: 0.9, prediction: null, classes: [] };
    this.view = { background: "falseColor", overlay: "none", opacity: 85, from: 0, hidden: false };
    this.view = { ...this.view, method: "softmax", k: 5, auto: true, brush: 2, centred: false };
    this.hidden = new Set(); // curves of the plot that are off
    [this.pixel, this.series, this.ndvi, this.others] = [null, null, null, []];
    [this.date, this.code] = [-1, 0];
    this.proposals = new Proposals(this);
    [this.images, this.times, this.learnedVersion] = [new Map(), {}, -1];
    this.setBackground = (key) => this.change({ background: key });
    this.setOverlay = (key) => this.change({ overlay: key, hidden: false });
  }

  hasData(pixel) {
    return this.data.scales[pixel] >= 0;
  }

  // ---- view ----

  change(view) {
    Object.assign(this.view, view);
    this.compose();
    this.keep();
  }

  // Show another map. If it is of the same pixels, the pixel that is looked at and the view stay.
  showScene(index) {
    const same = this.scenes[index].grid === this.scene.grid;
    this.proposals.end();
    this.scene = this.scenes[index];
    this.images.clear();
    this.#readYear((same && this.pixel) || null);
    this.map.show(this.scene, same);
    this.refresh();
    this.drawYear();
    if (this.pixel && this.found.similarity) this.findSimilar(false);
  }

  // Show everything anew.
  refresh() {
    this.found.classes = this.labels.classes;
    showPixel(this);
    showClasses(this);
    showSimilarity(this);
    showMap(this);
    this.map.mark(this.labels);
    this.compose();
  }

  #image(key) {
    if (!this.images.has(key)) {
      const { scene, found, view, data } = this;
      this.images.set(key, paintLayer(scene, key, found, data.scales, view.from));
    }
    return this.images.get(key);
  }

  // Put the layers on the map, those that there are.
  compose() {
    const { view, scene, found } = this;
    if (!isThere(scene, view.background, found)) view.background = "falseColor";
    if (!isThere(scene, view.overlay, found)) view.overlay = "none";
    const layers = [];
    if (view.background !== "none")
      layers.push({ image: this.#image(view.background), opacity: 1 });
    if (view.overlay !== "none" && !view.hidden) {
      layers.push({ image: this.#image(view.overlay), opacity: view.opacity / 100 });
    }
    this.map.layers = layers;
    this.map.draw();
    showLayers(this);
  }

  // ---- a pixel ----

  // Look at a pixel: its facts and year at once, similar pixels when the workers have answered.
  async look(row, column) {
    const start = performance.now();
    this.proposals.end();
    this.show({ row, column });
    await this.findSimilar();
    this.times.look = performance.now() - start;
  }

  // Show the facts and the year of a pixel.
  show(pixel) {
    this.#readYear(pixel);
    showPixel(this);
    this.showTab("pixelPage");
    this.drawYear();
    this.map.draw();
  }

  // Take the series of a pixel (or of none), and those that other maps have of it.
  #readYear(pixel) {
    this.pixel = this.map.pixel = pixel;
    const read = (scene) => {
      const series = pixel && seriesAt(scene, pixel.row, pixel.column);
      return { title: scene.title, series, ndvi: series && ndviOf(series) };
    };
    Object.assign(this, read(this.scene), { date: -1 });
    const same = this.scenes.filter((one) => one !== this.scene && one.grid === this.scene.grid);
    this.others = same.map(read).filter(({ series }) => series).slice(0, MAX_OTHERS);
  }

  // Find the pixels like the one that is looked at; onTop: show them where nothing else is.
  async findSimilar(onTop = true) {
    const { row, column } = this.pixel;
    const vector = vectorOf(this.data, this.scene.first + row * this.scene.width + column);
    if (!vector) return this.say("No data here: too few clear dates for an embedding.");
    const { offset, rest } = this.facts.embedding;
    const about = this.view.centred
      ? { name: "mean", offset: offset.map(() => 0), rest: 0 }
      : { name: "origin", offset, rest };
    const asked = (this.similarityAsked = {});
    const parts = await this.pool.all({ task: "similarity", vector, about });
    if (asked !== this.similarityAsked) return; // a later click was faster
    this.found.similarity = concatenate(parts);
    if (!this.thresholdChosen) this.found.threshold = shareThreshold(this.found.similarity);
    if (onTop && this.view.overlay === "none") this.view.overlay = "similarity";
    this.showSimilar();
  }

  showSimilar() {
    this.images.delete("similarity");
    showSimilarity(this);
    this.compose();
  }

  setThreshold(value) {
    this.found.threshold = value;
    this.thresholdChosen = true;
    this.showSimilar();
  }

  // The share, in percent, from which the colours of confidence begin.
  setFrom(percent) {
    for (const key of ["confidence", "mapConfidence"]) this.images.delete(key);
    this.change({ from: percent });
  }

  toggleCurve(name) {
    if (!this.hidden.delete(name)) this.hidden.add(name);
    showPixel(this);
    this.drawYear();
  }

  drawYear() {
    const [canvas, note] = [document.getElementById("year"), document.getElementById("yearNote")];
    if (!this.series || !canvas.clientWidth) return;
    drawYear(canvas, [this, ...this.others], this.hidden, this.date);
    const { series, pixel, scene } = this;
    const far = series.row !== pixel.row || series.column !== pixel.column;
    const [row, column] = [series.row * scene.stride, series.column * scene.stride];
    const resting = far
      ? `Year of the nearest pixel whose series is in the page: row ${row}, column ${column}.`
      : "Point at the plot to read a date.";
    note.textContent =
      this.date < 0 ? resting : describeDate(series, this.ndvi, this.date, this.hidden);
  }

  pointAtDate(canvas, left) {
    this.date = left === null || !this.series ? -1 : dateAt(this.series, canvas, left);
    this.drawYear();
  }

  // ---- labels ----

  chooseClass(code, focus = true) {
    this.code = code;
    this.showTab("labelsPage");
    markClass(this);
    if (focus && this.map.tool === "look") this.setTool("label");
  }

  addClass() {
    const code = this.labels.addClass();
    if (!code) return this.say("There are 255 classes, and labels.npy holds no more.");
    this.chooseClass(code);
    nameClass();
  }

  // A class that gets the name of one of the tile's gets its colour, too.
  renameClass(code, name) {
    const { classes, mapClasses = {} } = this.scene;
    const all = [...Object.values(classes), ...Object.values(mapClasses)];
    const known = all.find((one) => one.name === name);
    this.labels.editClass(code, known ? { name, color: known.color } : { name });
  }

  // Add the tile's classes to the page's, joined by name. Returns a Map from codes to the page's.
  takeClasses() {
    const { classes } = this.scene;
    const codes = this.labels.takeClasses(classes);
    const moved = [...codes].filter(([code, own]) => code !== own);
    const lines = moved.map(([code, own]) =>
      own
        ? `${classes[code].name} is ${code} in this tile and ${own} in the page`
        : `no code is left for ${classes[code].name}`,
    );
    if (moved.length) this.say(`Classes are joined by name: ${lines.join(", ")}.`);
    this.chooseClass(this.labels.classes[0].code);
    return codes;
  }

  // Ten labels of each of the tile's classes.
  drawTen() {
    const codes = this.takeClasses();
    const free = (pixel) => this.hasData(pixel) && !this.labels.byPixel.has(pixel);
    const chosen = chooseLabels(this.scene, 10, free);
    const own = chosen.map(({ pixel, code }) => ({ pixel, code: codes.get(code) }));
    this.labels.setMany(own.filter(({ code }) => code));
    this.setTool("look");
  }

  setTool(tool) {
    this.map.tool = tool;
    this.map.brush = tool === "brush" || tool === "erase" ? this.view.brush : 0;
    this.map.draw();
    if (tool !== "look") this.showTab("labelsPage");
    this.toolChanged(tool);
  }

  // The class to label with; one is made where there is none.
  #classToUse() {
    if (!this.labels.classOf(this.code)) {
      this.code = this.labels.classes[0]?.code ?? this.labels.addClass();
      this.say(
        `Labels go to ${this.labels.classOf(this.code).name}: choose or add classes in the panel.`,
      );
    }
    return this.code;
  }

  pick(row, column) {
    if (this.map.tool === "look") return this.look(row, column);
    const pixel = this.scene.first + row * this.scene.width + column;
    if (!this.hasData(pixel))
      return this.say("No data here: too few clear dates for an embedding.");
    this.labels.set([pixel], this.#classToUse());
  }

  stroke(phase, row, column) {
    if (phase === "begin") {
      if (this.map.tool === "brush") this.#classToUse();
      this.labels.beginStroke();
    } else if (phase === "end") this.labels.endStroke();
    else {
      const pixels = brushPixels(this.scene, row, column, this.view.brush);
      const code = this.map.tool === "erase" ? 0 : this.code;
      this.labels.paint(
        pixels.filter((pixel) => this.hasData(pixel)),
        code,
      );
    }
  }

  labelsChanged() {
    if (this.labels.stroke) return this.map.mark(this.labels); // the rest waits for its end
    if (!this.labels.classOf(this.code)) this.code = this.labels.classes[0]?.code ?? 0;
    this.images.delete("map");
    const { prediction } = this.found;
    if (this.labels.usedCodes().size < 2 || !hasClassesOf(this.labels, prediction)) this.dropMap();
    this.refresh();
    this.keep();
    if (this.view.auto && this.labels.version !== this.learnedVersion) this.learnSoon();
    this.proposals.labelsChanged();
  }

  // ---- the page's own map ----

  learnSoon() {
    clearTimeout(this.learnTimer);
    this.learnTimer = setTimeout(() => this.learn(), PATIENCE);
  }

  // Forget the map, and the one that is being made: it is of other labels.
  dropMap() {
    this.proposals.end();
    this.run = this.found.prediction = null;
    for (const key of ["map", "mapConfidence"]) this.images.delete(key);
  }

  // The labelled pixels as learn.js takes them; null for fewer than two classes.
  training() {
    const { size } = this.data;
    const { method, k } = this.view;
    const byClass = new Map();
    for (const [pixel, { code, click }] of this.labels.byPixel) {
      if (!byClass.has(code)) byClass.set(code, []);
      byClass.get(code).push({ pixel, click });
    }
    const codes = [...byClass.keys()].sort((a, b) => a - b);
    if (codes.length < 2) return null;
    const room = Math.max(200, Math.round(MAX_NEAREST_WORK / this.data.scales.length));
    const count = method === "nearest" ? Math.min(MAX_TRAINING, room) : MAX_TRAINING;
    const rows = thin(
      codes.map((code) => byClass.get(code)),
      count,
    );
    const clicks = new Map();
    for (const { click } of rows) if (!clicks.has(click)) clicks.set(click, clicks.size);
    const vectors = new Float32Array(rows.length * size);
    rows.forEach(({ pixel }, i) => vectors.set(vectorOf(this.data, pixel), i * size));
    const target = Uint8Array.from(rows, (row) => row.target);
    const click = rows.map((row) => clicks.get(row.click));
    const { deviation } = this.facts.embedding;
    return { codes, method, k, size, deviation, vectors, target, click, classes: codes.length };
  }

  // Learn from the labels, score the clicks, and map all pixels with calibrated confidence.
  async learn() {
    if (this.learning) return (this.learnAgain = true);
    const [start, training, version] = [performance.now(), this.training(), this.labels.version];
    this.learnedVersion = version;
    if (!training) {
      this.dropMap();
      return this.refresh();
    }
    this.learning = true;
    const run = (this.run = {}); // another one, or none, as soon as the labels are others
    const model = await this.pool.one({ task: "train", training });
    const score = await this.pool.one({ task: "score", training });
    model.temperature = score.temperature;
    const parts = await this.pool.all({ task: "predict", model });
    const join = (key) => concatenate(parts.map((part) => part[key]));
    this.times.learn = performance.now() - start;
    const { codes, method, target } = training;
    const about = { pixels: target.length, seconds: this.times.learn / 1000, version };
    const keys = ["classes", "confidence", "margin"];
    const found = Object.fromEntries(keys.map((key) => [key, join(key)]));
    if (run === this.run) this.showPrediction({ codes, method, about, ...found });
    this.learning = false;
    if (run === this.run && this.found.prediction) showScore(this, (this.score = score));
    if (this.learnAgain) [this.learnAgain] = [false, this.learn()];
  }

  showPrediction(prediction) {
    if (!hasClassesOf(this.labels, prediction)) return; // one was deleted meanwhile
    this.found.prediction = prediction;
    this.images.delete("map");
    this.images.delete("mapConfidence");
    if (["none", "similarity", "labels", "classes"].includes(this.view.overlay))
      this.view.overlay = "map";
    this.refresh();
    this.proposals.mapChanged();
  }

  // ---- files and sessions ----

  // <name>.<ending>, with the map's title in it where the page has several.
  #fileName(name) {
    const title = this.scene.title.replace(/[^\p{L}\p{N}.-]+/gu, "_").replace(/^_+|_+$/g, "");
    return this.scenes.length > 1 ? name.replace(".", () => `_${title}.`) : name;
  }

  saveLabels() {
    download(this.#fileName("labels.npy"), labelMap(this.scene, this.labels));
  }

  saveTileJson() {
    const { place, tileInfo } = this.scene;
    const known = place.crs ? { crs: place.crs, transform: place.transform } : {};
    const content = { ...known, ...tileInfo, classes: classTable(this.labels) };
    download(this.#fileName("tile.json"), [JSON.stringify(content, null, 1)], "application/json");
  }

  saveGeojson() {
    const content = geojson(this.scenes, this.labels);
    download("labels.geojson", [JSON.stringify(content, null, 1)], "application/geo+json");
  }

  saveMap() {
    const codes = mapCodes(this.scene, this.found.prediction);
    download(this.#fileName("map.npy"), npy(codes, this.scene.height, this.scene.width));
  }

  async saveGeotiff() {
    const why = whyNoGeotiff(this.scene);
    if (why) return this.say(why);
    const codes = mapCodes(this.scene, this.found.prediction);
    const parts = await geotiff(this.scene, codes, this.labels.classes);
    download(this.#fileName("map.tif"), parts, "image/tiff");
  }

  savePicture() {
    const image = paintLayer(this.scene, "map", this.found, this.data.scales);
    const picture = mapPicture(this.scene, image, classPixels(this), this.scene.title);
    picture.toBlob((blob) => download(this.#fileName("map.png"), [blob], "image/png"));
  }

  session() {
    return toSession(this.facts, this.scenes, this.labels, this.view);
  }

  saveSession() {
    download("session.json", [JSON.stringify(this.session(), null, 1)], "application/json");
  }

  keep() {
    this.storage.save(
      () => this.session(),
      () => this.say("This browser keeps nothing for this page: use Save session."),
    );
  }

  // Take a session from a file or the storage. Returns {taken, left}: labels that found their pixel
  // or did not. Throws an Error, and changes nothing, where it is no session.
  restore(session) {
    const { classes, labels, left, view } = readSession(session, this.scenes);
    Object.assign(this.view, view);
    this.images.clear();
    this.dropMap();
    this.labels.replace(classes, labels);
    return { taken: labels.length, left };
  }
}

const hasClassesOf = (labels, prediction) =>
  (prediction?.codes ?? []).every((code) => labels.classOf(code));

// The similarity that a share of the pixels reach, in thousandths.
function shareThreshold(values) {
  const counts = new Uint32Array(2001);
  let valid = 0;
  for (const value of values) {
    if (value !== value) continue;
    counts[Math.max(0, Math.min(2000, Math.floor((value + 1) * 1000)))]++;
    valid++;
  }
  let [place, above] = [2001, 0];
  while (place > 0 && above < valid * SHARE_SHOWN) above += counts[--place];
  return Math.min(MAX_THRESHOLD, place / 1000 - 1);
}

// At most `count` labelled pixels, equally many of each class: rows {pixel, click, target}.
function thin(classes, count) {
  const each = Math.floor(count / classes.length);
  return classes.flatMap((rows, target) => {
    const step = Math.max(1, rows.length / each);
    const kept = Math.min(rows.length, each);
    return Array.from({ length: kept }, (_, i) => ({ ...rows[Math.floor(i * step)], target }));
  });
}
