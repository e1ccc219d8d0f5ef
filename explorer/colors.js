// Colours: palettes that are safe for the colour-blind, and ramps for numbers.

// Of the class codes 1, 2, ..; page.py writes maps/land_cover.py's PALETTE here.
export const PALETTE = "{{PALETTE}}".split(" ");

export const paletteColor = (code) => PALETTE[(code - 1) % PALETTE.length];

export const BAND_COLORS = {
  B02: "#56b4e9",
  B03: "#009e73",
  B04: "#d55e00",
  B08: "#cc79a7",
  B11: "#e69f00",
  B12: "#b58863",
};

// Anchors of matplotlib's colour maps (CC0), evenly spaced.
const RAMPS = {
  viridis: "#440154 #472d7b #3b528b #2c728e #21918c #28ae80 #5ec962 #addc30 #fde725".split(" "),
  cividis: "#00224e #123570 #3b496c #575d6d #707173 #8a8678 #a59c74 #c3b369 #fee838".split(" "),
  // without its darkest third, which looks like what is hidden
  inferno: "#6a176e #8a226a #a82e5f #c63d4d #e05536 #f1731d #fa9b06 #f7c932 #fcffa4".split(" "),
};

export function parseColor(hex) {
  const number = parseInt(hex.slice(1), 16);
  return [(number >> 16) & 255, (number >> 8) & 255, number & 255];
}

// A colour as one number, as ImageData holds it on the (little-endian) machines of today.
export function pack(red, green, blue, alpha = 255) {
  return ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

export const packHex = (hex) => pack(...parseColor(hex));

// 256 packed colours of a ramp.
export function ramp(name) {
  const anchors = RAMPS[name].map(parseColor);
  return Uint32Array.from({ length: 256 }, (_, i) => {
    const place = (i / 255) * (anchors.length - 1);
    const low = Math.min(Math.floor(place), anchors.length - 2);
    const mix = (c) => anchors[low][c] + (anchors[low + 1][c] - anchors[low][c]) * (place - low);
    return pack(mix(0), mix(1), mix(2));
  });
}

export function gradient(name) {
  return `linear-gradient(90deg, ${RAMPS[name].join(", ")})`;
}

export const isColor = (text) => typeof text === "string" && /^#[0-9a-f]{6}$/i.test(text);

// Black or white, whichever is read better on a colour.
export function inkOn(hex) {
  const [red, green, blue] = parseColor(hex);
  return 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#000000" : "#ffffff";
}
