// Which pixel to label next: one that the page's map is least sure of, away from labelled ones.
import { placeOf } from "./files.js";
import { showProposal } from "./panel.js";

export const LABEL_FIRST =
  "Label pixels of two classes first: choose a class, then Label (L), then click the map.";
const CELLS_ALONG = 20; // cells along the longer edge of a scene, at first

// Proposes pixels to label, one by one.
export class Proposals {
  constructor(app) {
    this.app = app;
    // pixel: the one that is proposed; null when it is labelled, until the map has learned it
    [this.going, this.pixel, this.past] = [false, null, new Set()];
  }

  // Show the next pixel; those that were proposed before are left out.
  next() {
    const { app, past } = this;
    const { scene, labels, found } = app;
    if (!found.prediction) return app.say(LABEL_FIRST);
    const pixel = chooseNext(scene, found.prediction, [...labels.byPixel.keys(), ...past]);
    if (pixel < 0) {
      this.end();
      return app.say("No pixel is left that could be labelled next.");
    }
    past.add(pixel);
    [this.going, this.pixel] = [true, pixel];
    const [row, column] = placeOf(scene, pixel);
    app.show({ row, column });
    app.map.center({ row, column });
    showProposal(app);
  }

  // Give the proposed pixel its class.
  answer(code) {
    if (this.pixel !== null) this.app.labels.set([this.pixel], code);
  }

  labelsChanged() {
    const { labels, view } = this.app;
    if (!labels.byPixel.has(this.pixel)) return;
    this.pixel = null;
    if (!view.auto) this.next(); // no new map comes
  }

  mapChanged() {
    if (this.going && this.pixel === null) this.next();
  }

  end() {
    [this.going, this.pixel] = [false, null];
    this.past.clear();
    showProposal(this.app);
  }
}

// Number of the pixel to label next, or -1 where none is left: the one of least margin (probability
// of the most probable class less that of the second) that has no pixel of `done` in its cell or in
// a cell beside it. Where all cells are full they are halved. Without chance: the same labels lead
// to the same pixel. prediction: {codes, classes, margin}; done: pixels that are labelled or were
// proposed before.
function chooseNext(scene, prediction, done) {
  const inside = (pixel) => pixel >= scene.first && pixel < scene.first + scene.size;
  const pixels = [...done].filter(inside).map((pixel) => pixel - scene.first);
  let side = Math.ceil(Math.max(scene.height, scene.width) / CELLS_ALONG);
  for (; ; side = Math.ceil(side / 2)) {
    const best = leastMargin(scene, prediction, side, fullCells(scene, pixels, side));
    if (best >= 0 || side === 1) return best;
  }
}

// 1 for each cell with one of the pixels in it or beside it; one row and column more on each side.
function fullCells(scene, pixels, side) {
  const [across, down] = [scene.width, scene.height].map((size) => Math.ceil(size / side) + 2);
  const full = new Uint8Array(across * down);
  for (const pixel of pixels) {
    const row = Math.floor(Math.floor(pixel / scene.width) / side);
    const start = row * across + Math.floor((pixel % scene.width) / side);
    for (let i = 0; i < 3; i++) full.fill(1, start + i * across, start + i * across + 3);
  }
  return { full, across };
}

function leastMargin(scene, { codes, classes, margin }, side, { full, across }) {
  let [best, least, first] = [-1, 256, 0];
  for (let row = 0, pixel = scene.first; row < scene.height; row++) {
    const start = (Math.floor(row / side) + 1) * across + 1;
    for (let column = 0; column < scene.width; column++, pixel++) {
      if (margin[pixel] > least || classes[pixel] >= codes.length) continue; // unsure; has data
      if (full[start + Math.floor(column / side)]) continue;
      const order = Math.imul(pixel + 1, 2654435761) >>> 0; // of equal ones none is preferred
      if (margin[pixel] === least && order >= first) continue;
      [best, least, first] = [pixel, margin[pixel], order];
    }
  }
  return best;
}
