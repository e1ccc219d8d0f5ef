// Files that leave the page: NumPy arrays, GeoJSON, pictures.
import { describeArea, geographic, mapCoordinates, middle, scaleBar } from "./geo.js";

export function download(name, parts, type = "application/octet-stream") {
  const url = URL.createObjectURL(new Blob(parts, { type }));
  const link = document.createElement("a");
  [link.href, link.download] = [url, name];
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

// A map (height, width) uint8 as a .npy file, format 1.0.
export function npy(array, height, width) {
  const text = `{'descr': '|u1', 'fortran_order': False, 'shape': (${height}, ${width}), }`;
  const length = Math.ceil((10 + text.length + 1) / 64) * 64 - 10;
  const header = `${text.padEnd(length - 1)}\n`;
  const start = [0x93, 0x4e, 0x55, 0x4d, 0x50, 0x59, 1, 0, length & 255, length >> 8];
  return [Uint8Array.from(start), new TextEncoder().encode(header), array];
}

// Row and column on the page's grid of a pixel of a scene.
export function placeOf(scene, pixel) {
  const index = pixel - scene.first;
  return [Math.floor(index / scene.width), index % scene.width];
}

// The labels of a scene on the tile's own pixels, as labels.npy holds them; 0: no label.
export function labelMap(scene, labels) {
  const map = new Uint8Array(scene.fullHeight * scene.fullWidth);
  for (const [pixel, { code }] of labels.byPixel) {
    if (pixel < scene.first || pixel >= scene.first + scene.size) continue;
    const [row, column] = placeOf(scene, pixel);
    map[row * scene.stride * scene.fullWidth + column * scene.stride] = code;
  }
  return npy(map, scene.fullHeight, scene.fullWidth);
}

// {code: {name, color}}, as tile.json holds it.
export function classTable(labels) {
  return Object.fromEntries(labels.classes.map(({ code, name, color }) => [code, { name, color }]));
}

// All labels as GeoJSON points (RFC 7946: longitude and latitude); no geometry where the place is
// not known.
export function geojson(scenes, labels) {
  const features = [];
  for (const [pixel, { code, click }] of labels.byPixel) {
    const scene = scenes.find((one) => pixel < one.first + one.size);
    const [row, column] = placeOf(scene, pixel);
    const center = [middle(scene, row), middle(scene, column)];
    const place = geographic(scene, ...center);
    const map = mapCoordinates(scene, ...center);
    const geometry = place && { type: "Point", coordinates: place.map((v) => +v.toFixed(7)) };
    const properties = {
      code,
      class: labels.classOf(code).name,
      color: labels.classOf(code).color,
      tile: scene.name,
      map: scene.title,
      row: row * scene.stride,
      column: column * scene.stride,
      click,
      ...(map && { x: map[0], y: map[1], crs: scene.place.crs }),
    };
    features.push({ type: "Feature", geometry, properties });
  }
  return { type: "FeatureCollection", features };
}

// ---- picture of the map -------------------------------------------------------------------------

// The map with title, legend, areas and a scale bar as a canvas.
// image: canvas of the scene's grid. classes: [{name, color, pixels}].
export function mapPicture(scene, image, classes, title) {
  const zoom = Math.max(1, Math.round(900 / Math.max(scene.height, scene.width)));
  const [width, height] = [scene.width * zoom, scene.height * zoom];
  const [edge, legend, line] = [24, 300, 26];
  const canvas = document.createElement("canvas");
  canvas.width = width + legend + 3 * edge;
  canvas.height = Math.max(height + 60, 60 + line * (classes.length + 2)) + 2 * edge;
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#ffffff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(image, edge, edge, width, height);
  pen.fillStyle = "#1b1f24";
  pen.font = "600 17px system-ui, sans-serif";
  pen.fillText(title, edge, height + edge + 48, canvas.width - 2 * edge);
  pen.font = "15px system-ui, sans-serif";
  classes.forEach(({ name, color, pixels }, i) => {
    const [left, top] = [width + 2 * edge, edge + i * line];
    pen.fillStyle = color;
    pen.fillRect(left, top, 18, 18);
    pen.fillStyle = "#1b1f24";
    pen.fillText(name, left + 28, top + 14, 160);
    pen.textAlign = "right";
    pen.fillText(describeArea(scene, pixels), left + legend - 10, top + 14, 100);
    pen.textAlign = "left";
  });
  const bar = scaleBar(scene, zoom, 200);
  pen.fillRect(edge, height + edge + 12, bar.width, 4);
  pen.fillText(bar.text, edge + bar.width + 10, height + edge + 20);
  return canvas;
}
