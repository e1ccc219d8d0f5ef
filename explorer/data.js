// What explore.py put into the page: facts as JSON, arrays as compressed base64.
import { concatenate } from "./pool.js";

const TYPES = {
  int8: Int8Array,
  uint8: Uint8Array,
  uint16: Uint16Array,
  float32: Float32Array,
};
const CHUNK = 1 << 20; // characters decoded at once; a multiple of 4

export function readFacts() {
  return JSON.parse(document.getElementById("facts-json").textContent);
}

function decode(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const padding = text.endsWith("==") ? 2 : text.endsWith("=") ? 1 : 0;
  const out = new Uint8Array((text.length / 4) * 3 - padding);
  for (let start = 0, at = 0; start < text.length; start += CHUNK) {
    const part = atob(text.slice(start, start + CHUNK));
    for (let i = 0; i < part.length; i++) out[at++] = part.charCodeAt(i);
  }
  return out;
}

// The array of {blob, type}. The text leaves the page, which would keep it in memory for nothing.
export async function readArray({ blob, type }) {
  const element = document.getElementById(`blob-${blob}`);
  const bytes = decode(element.textContent);
  element.remove();
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new TYPES[type](await new Response(stream).arrayBuffer());
}

// The maps of the page as scenes, and their pixels in one row: {scenes, values (N * K) int8,
// scales (N), size: K}. Pixel number p of a scene is `first` + row * width + column.
export async function readScenes(facts, progress) {
  const [scenes, values, scales] = [[], [], []];
  let first = 0;
  for (const scene of facts.scenes) {
    values.push(await readArray(scene.embedding));
    scales.push(await readArray(scene.scales));
    progress((scenes.length + 0.7) / facts.scenes.length);
    const layers = {};
    for (const [name, place] of Object.entries(scene.layers)) layers[name] = await readArray(place);
    const series = scene.series && {
      ...scene.series,
      values: await readArray(scene.series.values),
      clear: await readArray(scene.series.clear),
    };
    const size = scene.height * scene.width;
    scenes.push({ ...scene, layers, series, first, size, index: scenes.length });
    first += size;
    progress(scenes.length / facts.scenes.length);
  }
  const size = facts.embedding.dimensions;
  return { scenes, values: concatenate(values), scales: concatenate(scales), size };
}

// The vector (K) of a pixel; null where it has no data.
export function vectorOf({ values, scales, size }, pixel) {
  const scale = scales[pixel];
  if (!(scale >= 0)) return null;
  return Float32Array.from(values.subarray(pixel * size, (pixel + 1) * size), (v) => v * scale);
}

// The year of the pixel nearest to a row and column of the page's grid:
// {row, column, dates, bands: [{name, values}], clear, days}, values in reflectance, NaN: nodata.
export function seriesAt(scene, row, column) {
  const { series } = scene;
  if (!series) return null;
  const { step, bands, doys } = series;
  const across = Math.ceil(scene.width / step);
  const down = Math.ceil(scene.height / step);
  const [r, c] = [
    Math.min(Math.round(row / step), down - 1),
    Math.min(Math.round(column / step), across - 1),
  ];
  const [dates, number] = [doys.length, r * across + c];
  const at = (date, band) => series.values[(number * dates + date) * bands.length + band];
  const read = (band) => doys.map((_, date) => at(date, band) / 10000 || NaN);
  return {
    row: r * step,
    column: c * step,
    days: doys,
    dates: series.dates,
    bands: bands.map((name, band) => ({ name, values: read(band) })),
    clear: doys.map((_, date) => series.clear[number * dates + date] > 0),
  };
}

// Normalised difference vegetation index of a series, or null without red and near infrared.
export function ndviOf(series) {
  const band = (name) => series.bands.find((one) => one.name === name)?.values;
  const [red, infrared] = [band("B04"), band("B08") ?? band("B8A")];
  if (!red || !infrared) return null;
  return red.map((value, date) => (infrared[date] - value) / (infrared[date] + value));
}
