// A map of class codes as a GeoTIFF: one band of bytes, compressed, with colours and its place.
import { parseColor } from "./colors.js";

const [BYTES, SHORT, LONG, DOUBLE] = [2, 3, 4, 12]; // types of a tag's numbers; BYTES are ASCII
const ARRAYS = { [BYTES]: Uint8Array, [SHORT]: Uint16Array, [LONG]: Uint32Array };
ARRAYS[DOUBLE] = Float64Array;
const HEADER = 8; // bytes

// Why a scene's maps cannot be saved as GeoTIFF, in words; "" where they can.
export function whyNoGeotiff({ place }) {
  if (!place.transform) return "No GeoTIFF: the place of this map is not known. Save map.npy.";
  if (!place.epsg)
    return "No GeoTIFF: the coordinate reference system has no EPSG code. Save map.npy.";
  return "";
}

// What says where the pixels are: the affine matrix of the page's grid, and the EPSG code.
function placeTags({ place, stride }) {
  const [a, b, c, d, e, f] = place.transform;
  const [right, down] = [stride * a, stride * e];
  const matrix = [right, stride * b, 0, c, stride * d, down, 0, f, 0, 0, 0, 0, 0, 0, 0, 1];
  const degrees = place.unit === "degree";
  // model (1: projected, 2: geographic), pixels are areas, code
  const keys = [
    [1024, 0, 1, degrees ? 2 : 1],
    [1025, 0, 1, 1],
    [degrees ? 2048 : 3072, 0, 1, place.epsg],
  ];
  return [
    [34264, DOUBLE, matrix],
    [34735, SHORT, [1, 1, 0, keys.length, ...keys.flat()]],
  ];
}

// Red, then green, then blue of 256 codes, in 16 bits.
function colorMap(classes) {
  const table = new Uint16Array(3 * 256);
  for (const { code, color } of classes) {
    parseColor(color).forEach((value, i) => (table[256 * i + code] = 257 * value));
  }
  return table;
}

async function deflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new CompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// The parts of the file. codes: (height * width) uint8, 0: no data; classes: [{code, color}].
export async function geotiff(scene, codes, classes) {
  const strip = await deflate(codes);
  const tags = [
    [256, LONG, [scene.width]],
    [257, LONG, [scene.height]],
    [258, SHORT, [8]], // bits
    [259, SHORT, [8]], // deflate
    [262, SHORT, [3]], // codes of a colour map
    [273, LONG, [0]], // where the strip begins, known below
    [277, SHORT, [1]],
    [278, LONG, [scene.height]],
    [279, LONG, [strip.length]],
    [320, SHORT, colorMap(classes)],
    ...placeTags(scene),
    [42113, BYTES, [48, 0]], // GDAL's tag: nodata is "0"
  ];
  const contents = tags.map(([, type, numbers]) => {
    const content = new Uint8Array(ARRAYS[type].from(numbers).buffer);
    return content.length > 4 ? content : Uint8Array.of(...content, 0, 0, 0, 0).subarray(0, 4);
  });
  // header, directory, then the contents that do not fit into it (each at a multiple of 8)
  let end = HEADER + Math.ceil((2 + 12 * tags.length + 4) / 8) * 8;
  const places = contents.map((content) => {
    const place = end;
    if (content.length > 4) end += Math.ceil(content.length / 8) * 8;
    return place;
  });
  contents[5] = new Uint8Array(Uint32Array.of(end).buffer);
  const head = new Uint8Array(end);
  const view = new DataView(head.buffer);
  head.set([0x49, 0x49, 42, 0, HEADER]);
  view.setUint16(HEADER, tags.length, true);
  tags.forEach(([tag, type, numbers], i) => {
    const entry = HEADER + 2 + 12 * i;
    view.setUint16(entry, tag, true);
    view.setUint16(entry + 2, type, true);
    view.setUint32(entry + 4, numbers.length, true);
    if (contents[i].length > 4) view.setUint32(entry + 8, places[i], true);
    head.set(contents[i], contents[i].length > 4 ? places[i] : entry + 8);
  });
  return [head, strip];
}
