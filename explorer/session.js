// Sessions: classes and labels, kept in the browser's storage and in files.
// Labels are kept by tile, row and column of the tile, so that a page of another stride or of more
// tiles can take them too.
import { placeOf } from "./files.js";

const FORMAT = 1;
const WAIT = 300; // milliseconds between a change and its saving

export function toSession(facts, scenes, labels, view) {
  const byPixel = [...labels.byPixel].map(([pixel, { code, click }]) => {
    const scene = scenes.find((one) => pixel < one.first + one.size);
    const [row, column] = placeOf(scene, pixel).map((index) => index * scene.stride);
    return { tile: scene.name, scene: scene.index, row, column, code, click };
  });
  const { hash, title } = facts;
  return { format: FORMAT, page: { hash, title }, classes: labels.classes, labels: byPixel, view };
}

const isIndex = (value, below) => Number.isInteger(value) && value >= 0 && value < below;

// Read a session into `labels`. Returns {taken, left}: labels that found their pixel or did not.
// Throws an Error in words where it is no session.
export function fromSession(session, scenes, labels) {
  if (
    session?.format !== FORMAT ||
    !Array.isArray(session.classes) ||
    !Array.isArray(session.labels)
  ) {
    throw new Error(
      "This file is no session of this page: wanted the JSON that Save session wrote.",
    );
  }
  const classes = session.classes.filter((one) => isIndex(one?.code - 1, 255));
  const codes = new Set(classes.map((one) => one.code));
  const found = [];
  for (const { tile, scene: number, row, column, code, click } of session.labels) {
    const named = scenes.filter((one) => one.name === tile);
    const scene = named.find((one) => one.index === number) ?? named[0];
    if (!scene || !codes.has(code) || !isIndex(click, 1e9)) continue;
    const [r, c] = [row / scene.stride, column / scene.stride];
    if (!isIndex(r, scene.height) || !isIndex(c, scene.width)) continue;
    found.push([scene.first + r * scene.width + c, { code, click }]);
  }
  labels.replace(classes, found);
  return { taken: found.length, left: session.labels.length - found.length };
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
