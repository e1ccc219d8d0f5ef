// Places, lengths and areas of the pixels of a scene.

// Map coordinates at a row and column of the page's grid (fractions allowed), or null.
export function mapCoordinates(scene, row, column) {
  if (!scene.place.transform) return null;
  const [a, b, c, d, e, f] = scene.place.transform;
  const [x, y] = [column * scene.stride, row * scene.stride];
  return [a * x + b * y + c, d * x + e * y + f];
}

// Longitude and latitude (WGS84, degrees), interpolated in the grid that explore.py computed.
export function geographic(scene, row, column) {
  const { grid } = scene.place;
  if (!grid) return null;
  const down = ((row * scene.stride) / scene.fullHeight) * (grid.rows - 1);
  const across = ((column * scene.stride) / scene.fullWidth) * (grid.columns - 1);
  const r = Math.max(0, Math.min(Math.floor(down), grid.rows - 2));
  const c = Math.max(0, Math.min(Math.floor(across), grid.columns - 2));
  const [s, t] = [down - r, across - c];
  const mix = (values) => {
    const at = (i, j) => values[(r + i) * grid.columns + c + j];
    const top = at(0, 0) * (1 - t) + at(0, 1) * t;
    return top * (1 - s) + (at(1, 0) * (1 - t) + at(1, 1) * t) * s;
  };
  return [((mix(grid.lon) + 540) % 360) - 180, mix(grid.lat)];
}

// The middle of a pixel: a pixel of a thinned grid is the first of its rows and columns on disk.
export const middle = (scene, index) => index + 0.5 / scene.stride;

export function describePlace([lon, lat]) {
  const degrees = (value, positive, negative) =>
    `${Math.abs(value).toFixed(5)}° ${value < 0 ? negative : positive}`;
  return `${degrees(lat, "N", "S")}, ${degrees(lon, "E", "W")}`;
}

// Metres on the ground along a pixel of the page's grid, or 0 where not known.
export function metresPerPixel(scene) {
  if (!scene.place.hectares || !["metre", "meter", "m"].includes(scene.place.unit)) return 0;
  return Math.sqrt(scene.place.hectares * 10000) * scene.stride;
}

const digits = (n) => ({ minimumFractionDigits: n, maximumFractionDigits: n });

// The area of pixels of the page's grid, in hectares where their size is known.
export function describeArea(scene, pixels) {
  if (!scene.place.hectares) return `${pixels.toLocaleString("en")} px`;
  const hectares = pixels * scene.place.hectares * scene.stride ** 2;
  return hectares < 10000
    ? `${hectares.toLocaleString("en", digits(hectares < 100 ? 1 : 0))} ha`
    : `${(hectares / 100).toLocaleString("en", digits(0))} km²`;
}

// A round length for a scale bar of at most maxWidth screen pixels: {width, text}.
export function scaleBar(scene, zoom, maxWidth) {
  const unit = metresPerPixel(scene) || 1;
  const power = 10 ** Math.floor(Math.log10((maxWidth / zoom) * unit));
  const fits = (n) => (n / unit) * zoom <= maxWidth;
  const length = [5, 2, 1].map((n) => n * power).find(fits) ?? power;
  const text = metresPerPixel(scene)
    ? length >= 1000
      ? `${length / 1000} km`
      : `${length} m`
    : `${length} px`;
  return { width: (length / unit) * zoom, text };
}
