// Classes, and the labels of pixels; every change can be undone.
import { PALETTE, isColor, paletteColor } from "./colors.js";

const MAX_CLASSES = 255; // codes of labels.npy are 1..255; 0 is no label
const NAME_LENGTH = 60;

export class Labels {
  // changed: called after every change.
  constructor(changed) {
    this.classes = []; // {code, name, color}, in order
    this.byPixel = new Map(); // number of the pixel -> {code, click}
    this.undone = [];
    this.done = [];
    this.clicks = 0;
    this.version = 0; // counts changes of labels
    this.stroke = null; // what the brush has painted since it was put down
    this.changed = changed;
  }

  classOf(code) {
    return this.classes.find((one) => one.code === code);
  }

  // ---- labels ----

  #put(pixel, value) {
    this.version++;
    if (value) this.byPixel.set(pixel, value);
    else this.byPixel.delete(pixel);
  }

  #record(action) {
    this.done.push(action);
    this.undone = [];
  }

  // Begin a stroke: all labels until endStroke count as one click, and are undone at once.
  beginStroke() {
    this.stroke = { pixels: new Map(), click: this.clicks++ };
  }

  // Give pixels a class (0: take their label away), within a stroke.
  paint(pixels, code) {
    for (const pixel of pixels) {
      const before = this.byPixel.get(pixel) ?? null;
      if ((before?.code ?? 0) === code) continue;
      const after = code ? { code, click: this.stroke.click } : null;
      this.stroke.pixels.set(pixel, { before, after });
      this.#put(pixel, after);
    }
    this.changed();
  }

  endStroke() {
    if (this.stroke?.pixels.size) this.#record({ pixels: this.stroke.pixels });
    this.stroke = null;
    this.changed();
  }

  // One click: give pixels a class, or take their labels away (code 0).
  set(pixels, code) {
    this.beginStroke();
    this.paint(pixels, code);
    this.endStroke();
  }

  // Many clicks at once, [{pixel, code}], undone at once.
  setMany(labels) {
    const pixels = new Map();
    for (const { pixel, code } of labels) {
      const after = { code, click: this.clicks++ };
      pixels.set(pixel, { before: this.byPixel.get(pixel) ?? null, after });
      this.#put(pixel, after);
    }
    this.#record({ pixels });
    this.changed();
  }

  clear() {
    const pixels = new Map();
    for (const [pixel, before] of this.byPixel) pixels.set(pixel, { before, after: null });
    this.byPixel.clear();
    if (pixels.size) this.#record({ pixels });
    this.changed();
  }

  // ---- classes ----

  #changeClasses(change, pixels = new Map()) {
    const before = this.classes;
    this.classes = change(before.map((one) => ({ ...one })));
    for (const [pixel, { after }] of pixels) this.#put(pixel, after);
    this.#record({ pixels, before, after: this.classes });
    this.changed();
  }

  // Add a class; code, name and colour are made up where they are not given. Returns its code.
  addClass({ code, name, color } = {}) {
    const used = new Set(this.classes.map((one) => one.code));
    let free = 1;
    while (used.has(free)) free++;
    const chosen = code && !used.has(code) ? code : free;
    if (chosen > MAX_CLASSES) return 0;
    const colors = new Set(this.classes.map((one) => one.color));
    const next = [paletteColor(chosen), ...PALETTE].find((one) => !colors.has(one));
    const added = { code: chosen, name: name ?? `Class ${chosen}`, color: color ?? next };
    this.#changeClasses((classes) => [...classes, cleanClass(added)]);
    return chosen;
  }

  // Add classes {code: {name, color}} of a tile that are not here yet. Classes are joined by name:
  // one code may mean different classes in two tiles. Returns a Map from the tile's codes to codes
  // here, 0 where there are too many classes.
  takeClasses(classes) {
    const entries = Object.entries(classes).map(([key, one]) =>
      cleanClass({ ...one, code: Number(key) }),
    );
    const equal = (a, b) => a.code === b.code && a.name === b.name;
    const others = this.classes.filter((one) => !entries.some((entry) => equal(entry, one)));
    const used = new Set(this.classes.map((one) => one.code));
    const [codes, missing] = [new Map(), []];
    for (const entry of entries) {
      const place = others.findIndex((one) => one.name === entry.name);
      if (this.classes.some((one) => equal(one, entry))) codes.set(entry.code, entry.code);
      else if (place >= 0) codes.set(entry.code, others.splice(place, 1)[0].code);
      else missing.push(entry);
    }
    // first those that can keep their code
    missing.sort((a, b) => used.has(a.code) - used.has(b.code));
    for (const entry of missing) codes.set(entry.code, this.addClass(entry));
    return codes;
  }

  editClass(code, change) {
    this.#changeClasses((classes) =>
      classes.map((one) => (one.code === code ? cleanClass({ ...one, ...change }) : one)),
    );
  }

  // Remove a class and its labels.
  removeClass(code) {
    const pixels = new Map();
    for (const [pixel, before] of this.byPixel) {
      if (before.code === code) pixels.set(pixel, { before, after: null });
    }
    this.#changeClasses((classes) => classes.filter((one) => one.code !== code), pixels);
  }

  // ---- undo ----

  // when: "before" or "after" the action.
  #restore(action, when) {
    for (const [pixel, change] of action.pixels) this.#put(pixel, change[when]);
    if (action[when]) this.classes = action[when];
    this.changed();
  }

  undo() {
    const action = this.done.pop();
    if (!action) return;
    this.undone.push(action);
    this.#restore(action, "before");
  }

  redo() {
    const action = this.undone.pop();
    if (!action) return;
    this.done.push(action);
    this.#restore(action, "after");
  }

  // ---- counts ----

  // The codes of the classes that have labels.
  usedCodes() {
    return new Set([...this.byPixel.values()].map(({ code }) => code));
  }

  // {code: {pixels, clicks}} of the classes.
  counts() {
    const counts = new Map(this.classes.map((one) => [one.code, { pixels: 0, clicks: new Set() }]));
    for (const { code, click } of this.byPixel.values()) {
      const count = counts.get(code);
      count.pixels++;
      count.clicks.add(click);
    }
    for (const count of counts.values()) count.clicks = count.clicks.size;
    return counts;
  }

  // ---- sessions ----

  // Replace all by what a session holds; forgets what could be undone.
  replace(classes, labels) {
    this.classes = classes.map(cleanClass);
    this.byPixel = new Map(labels);
    this.clicks = 1 + labels.reduce((last, [, { click }]) => Math.max(last, click), -1);
    [this.done, this.undone, this.stroke] = [[], [], null];
    this.version++;
    this.changed();
  }
}

function cleanClass({ code, name, color }) {
  const text = typeof name === "string" ? name.slice(0, NAME_LENGTH) : "";
  return {
    code,
    name: text || `Class ${code}`,
    color: isColor(color) ? color.toLowerCase() : paletteColor(code),
  };
}

// Pixels of a round brush, [pixel numbers], at a row and column of a scene. radius 0: one pixel.
export function brushPixels(scene, row, column, radius) {
  const pixels = [];
  for (let r = Math.max(0, row - radius); r <= Math.min(scene.height - 1, row + radius); r++) {
    for (
      let c = Math.max(0, column - radius);
      c <= Math.min(scene.width - 1, column + radius);
      c++
    ) {
      const inside = (r - row) ** 2 + (c - column) ** 2 <= (radius + 0.3) ** 2;
      if (inside) pixels.push(scene.first + r * scene.width + c);
    }
  }
  return pixels;
}

// `each` labelled pixels a class of the tile's own labels, at random but always the same:
// [{pixel, code}]. usable: whether a pixel may be taken.
export function chooseLabels(scene, each, usable) {
  const found = new Map();
  const { labels } = scene.layers;
  for (let i = 0; i < scene.size; i++) {
    if (!labels[i] || !usable(scene.first + i)) continue;
    if (!found.has(labels[i])) found.set(labels[i], []);
    found.get(labels[i]).push(scene.first + i);
  }
  let state = 12345;
  const random = () => (state = (Math.imul(state, 1664525) + 1013904223) >>> 0) / 2 ** 32;
  const chosen = [];
  for (const [code, pixels] of [...found].sort((a, b) => a[0] - b[0])) {
    for (let i = 0; i < Math.min(each, pixels.length); i++) {
      const other = i + Math.floor(random() * (pixels.length - i));
      [pixels[i], pixels[other]] = [pixels[other], pixels[i]];
      chosen.push({ pixel: pixels[i], code });
    }
  }
  return chosen;
}
