// What can be seen on the map: layers as canvases of the scene's grid, and their legends.
import { gradient, pack, packHex, ramp } from "./colors.js";

export const BACKGROUNDS = {
  falseColor: "False colour",
  median: "Median RGB",
  count: "Clear dates",
  none: "None",
};
const SCRIM = pack(8, 10, 14, 200); // on what is not similar enough
export const OVERLAYS = {
  none: "Nothing",
  similarity: "Similar pixels",
  map: "Your map",
  mapConfidence: "Its confidence",
  classes: "Class map",
  confidence: "Its confidence",
  labels: "Tile's labels",
  quantity: "Quantity",
  applicability: "Unlike the training",
};
const LAYER_RAMPS = {
  similarity: "inferno",
  count: "viridis",
  quantity: "viridis",
  confidence: "cividis",
  mapConfidence: "cividis",
  applicability: "inferno",
};
const LIMIT = 128; // steps of applicability above it lie outside, 255 at twice the threshold

// Names in full, where the short ones are only clear beside the others.
export const FULL_NAMES = {
  mapConfidence: "Confidence of your map",
  classes: "Class map of infer.py",
  confidence: "Confidence of the class map of infer.py",
  quantity: "Map of a quantity of infer.py",
  applicability: "Outside of the area of applicability of infer.py's map",
};

// Whether a pixel is unlike all training labels of infer.py's map.
export const isOutside = (step) => step > LIMIT;

// A value of the map of a quantity, of its step 1 .. 65535, with few digits.
export function quantityAt({ quantity }, step) {
  const value = quantity.low + ((quantity.high - quantity.low) * (step - 1)) / 65534;
  return String(Number(value.toPrecision(4)));
}

// Whether a layer can be shown, with what the page has found so far.
export function isThere(scene, key, found) {
  if (key === "none") return true;
  if (key === "similarity") return Boolean(found.similarity);
  if (key === "map" || key === "mapConfidence") return Boolean(found.prediction);
  return Object.hasOwn(scene.layers, key);
}

// {code: {name, color}} of a layer: the class map has the classifier's, labels have the tile's.
export function classesOf(scene, key) {
  return (key === "classes" && scene.mapClasses) || scene.classes;
}

// Why a layer is not there, in words.
export const WHY_NOT = {
  similarity: "click a pixel first",
  map: "label two classes first",
  mapConfidence: "label two classes first",
  classes: "infer.py wrote none",
  confidence: "infer.py wrote none",
  labels: "the tile has none",
  median: "the tile was not found",
  count: "not found",
};

function paintRgb(out, rgb, scales, first) {
  for (let i = 0, at = 0; i < out.length; i++, at += 3) {
    const seen = rgb[at] | rgb[at + 1] | rgb[at + 2] || scales?.[first + i] >= 0;
    if (seen) out[i] = pack(rgb[at], rgb[at + 1], rgb[at + 2]);
  }
}

function paintCodes(out, codes, legend) {
  const table = new Uint32Array(256);
  for (const [code, { color }] of Object.entries(legend)) table[code] = packHex(color);
  for (let i = 0; i < out.length; i++) out[i] = table[codes[i]];
}

function paintNumbers(out, values, low, high, colors, hidden) {
  const scale = 255 / (high - low || 1);
  for (let i = 0; i < out.length; i++) {
    const value = values[i];
    if (hidden(value, i)) continue;
    out[i] = colors[Math.max(0, Math.min(255, Math.round((value - low) * scale)))];
  }
}

function maxOf(values) {
  let max = 1;
  for (const value of values) if (value > max) max = value;
  return max;
}

// The part of an array over all pixels that is the scene's.
export const partOf = (scene, array) => array.subarray(scene.first, scene.first + scene.size);

// Codes 0..255 of the page's own map.
export function mapCodes(scene, prediction) {
  const table = new Uint8Array(256);
  prediction.codes.forEach((code, i) => (table[i] = code));
  return partOf(scene, prediction.classes).map((number) => table[number]);
}

// Paint a layer into a canvas of the scene's grid.
// found: {similarity, threshold, prediction, classes (of the page)}; scales: NaN where no data;
// from: percent, where the colours of confidence begin.
export function paintLayer(scene, key, found, scales, from = 0) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [scene.width, scene.height];
  const pen = canvas.getContext("2d");
  const image = pen.createImageData(scene.width, scene.height);
  const out = new Uint32Array(image.data.buffer);
  const colors = LAYER_RAMPS[key] && ramp(LAYER_RAMPS[key]);
  const empty = (_, i) => !(scales[scene.first + i] >= 0);
  if (key === "falseColor") paintRgb(out, scene.layers.falseColor, scales, scene.first);
  if (key === "median") paintRgb(out, scene.layers.median);
  if (key === "count")
    paintNumbers(out, scene.layers.count, 0, maxOf(scene.layers.count), colors, () => false);
  if (key === "classes" || key === "labels")
    paintCodes(out, scene.layers[key], classesOf(scene, key));
  if (key === "quantity") {
    const none = (step) => step === 0;
    paintNumbers(out, scene.layers.quantity, ...scene.quantity.colors, colors, none);
  }
  if (key === "applicability") {
    const inside = (step) => !isOutside(step);
    paintNumbers(out, scene.layers.applicability, LIMIT, 255, colors, inside);
  }
  const sure = (values) => paintNumbers(out, values, 2.55 * from, 255, colors, empty);
  if (key === "confidence") sure(scene.layers.confidence);
  if (key === "similarity") {
    const below = (value) => !(value >= found.threshold);
    out.fill(SCRIM);
    paintNumbers(out, partOf(scene, found.similarity), found.threshold, 1, colors, below);
  }
  if (key === "map") {
    const legend = Object.fromEntries(found.classes.map((one) => [one.code, one]));
    paintCodes(out, mapCodes(scene, found.prediction), legend);
  }
  if (key === "mapConfidence") sure(partOf(scene, found.prediction.confidence));
  pen.putImageData(image, 0, 0);
  return canvas;
}

const countOf = (values) => Math.max(1, values.filter((value) => value > 0).length);

// The codes that occur in a layer, looked for once.
function codesOf(scene, key) {
  scene.codes ??= {};
  return (scene.codes[key] ??= new Set(scene.layers[key]));
}

// The legend of a layer: {title, gradient, low, high, from (where it can be chosen)} or {title,
// entries: [{name, color}]} or null.
export function legendOf(scene, key, found, from = 0) {
  const percent = { low: from ? `≤ ${from} %` : "0 %", high: "100 %", from };
  const bar = (title, ends) => ({ title, gradient: gradient(LAYER_RAMPS[key]), ...ends });
  const entries = (codes, classes) => classes.filter((one) => codes.has(one.code));
  const named = Object.entries(classesOf(scene, key));
  const own = named.map(([code, one]) => ({ ...one, code: Number(code) }));
  if (key === "similarity") {
    return bar("Cosine similarity", { low: found.threshold.toFixed(3), high: "1.000" });
  }
  if (key === "count") {
    return bar("Clear observations", { low: "0", high: String(maxOf(scene.layers.count)) });
  }
  if (key === "quantity") {
    const [low, high] = scene.quantity.colors.map((step) => quantityAt(scene, step));
    return bar(scene.quantity.label, { low: `≤ ${low}`, high: `≥ ${high}` });
  }
  if (key === "applicability") {
    const { applicability } = scene.layers;
    const share = (100 * applicability.filter(isOutside).length) / countOf(applicability);
    const title = `Outside of the area of applicability: ${share.toFixed(1)} %`;
    return bar(title, { low: "threshold", high: "≥ twice" });
  }
  if (key === "confidence") return bar("Probability of the class, infer.py", percent);
  if (key === "mapConfidence") {
    const nearest = found.prediction.method === "nearest";
    return bar(nearest ? "Share of the neighbours" : "Probability of the class", percent);
  }
  if (key === "classes" || key === "labels") {
    return { title: OVERLAYS[key], entries: entries(codesOf(scene, key), own) };
  }
  if (key === "map") {
    return {
      title: OVERLAYS.map,
      entries: entries(new Set(found.prediction.codes), found.classes),
    };
  }
  return null;
}
