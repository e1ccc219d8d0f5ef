// Sessions: classes and labels, kept in the browser's storage and in files.
// Labels are kept by tile, row and column of the tile, so that a page of another stride or of more
// tiles can take them too.
import { placeOf } from "./files.js";
import { BACKGROUNDS, OVERLAYS } from "./layers.js";

const FORMAT = 1;
const WAIT = 300; // milliseconds between a change and its saving

export function toSession(facts, scenes, labels, view) {
  const byPixel = [...labels.byPixel].map(([pixel, { code, click }]) => {
    const scene = scenes.find((one) => pixel < one.first + one.size);
    const [row, column] = placeOf(scene, pixel).map((index) => index * scene.stride);
    return { tile: scene.name, map: scene.title, scene: scene.index, row, column, code, click };
  });
  const { hash, title } = facts;
  return { format: FORMAT, page: { hash, title }, classes: labels.classes, labels: byPixel, view };
}

const isIndex = (value, below) => Number.isInteger(value) && value >= 0 && value < below;

// Classes, labels and view of a session, which may be any JSON: {classes, labels: [[pixel, {code,
// click}]], left, view}; left: how many labels have no pixel in this page.
// Throws an Error in words where it is no session.
export function readSession(session, scenes) {
  if (
    session?.format !== FORMAT ||
    !Array.isArray(session.classes) ||
    !Array.isArray(session.labels)
  ) {
    throw new Error(
      "This file is no session of this page: wanted the JSON that Save session wrote.",
    );
  }
  const classes = new Map();
  for (const one of session.classes) {
    if (Number.isInteger(one?.code) && one.code > 0 && one.code < 256 && !classes.has(one.code))
      classes.set(one.code, one);
  }
  const labels = [];
  for (const label of session.labels) {
    const { tile, map, scene: number, row, column, code, click } = label ?? {};
    const named = scenes.filter((one) => one.name === tile);
    const titled = named.find((one) => one.title === map);
    const scene = titled ?? named.find((one) => one.index === number) ?? named[0];
    if (!scene || !classes.has(code) || !isIndex(click, 1e9)) continue;
    if (!Number.isInteger(row) || !Number.isInteger(column)) continue;
    const [r, c] = [row / scene.stride, column / scene.stride];
    if (!isIndex(r, scene.height) || !isIndex(c, scene.width)) continue;
    labels.push([scene.first + r * scene.width + c, { code, click }]);
  }
  const left = session.labels.length - labels.length;
  return { classes: [...classes.values()], labels, left, view: readView(session.view ?? {}) };
}

const VIEW_WORDS = {
  background: Object.keys(BACKGROUNDS),
  overlay: Object.keys(OVERLAYS),
  method: ["softmax", "nearest"],
};
const VIEW_NUMBERS = { opacity: 101, from: 100, k: 26, brush: 21 }; // whole numbers below

// The entries of a session's view that this page has.
function readView(view) {
  const found = {};
  for (const [key, words] of Object.entries(VIEW_WORDS)) {
    if (words.includes(view[key])) found[key] = view[key];
  }
  for (const [key, below] of Object.entries(VIEW_NUMBERS)) {
    if (isIndex(view[key], below)) found[key] = view[key];
  }
  if (found.k === 0) delete found.k;
  return found;
}

// The browser's storage, of which a browser may have none for files.
export class Storage {
  constructor(hash) {
    this.key = `explore:${hash}`;
  }

  read() {
    try {
      return JSON.parse(localStorage.getItem(this.key));
    } catch {
      return null;
    }
  }

  // Save what `make` returns, a little later. failed: called where it cannot be kept.
  save(make, failed) {
    clearTimeout(this.timer);
    this.pending = () => {
      this.pending = null;
      try {
        localStorage.setItem(this.key, JSON.stringify(make()));
      } catch {
        failed();
      }
    };
    this.timer = setTimeout(() => this.flush(), WAIT);
  }

  // Save now what waits to be saved.
  flush() {
    this.pending?.();
  }
}
