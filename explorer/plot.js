// The year of a pixel on a canvas: NDVI above, chosen bands below, clear and cloudy dates apart.
// Other years of the pixel have other lines. Years: [{series, ndvi}], first the shown map's.
import { BAND_COLORS } from "./colors.js";

const MONTHS = ["J", "F", "M", "A", "M", "J", "J", "A", "S", "O", "N", "D"];
const STARTS = [1, 32, 60, 91, 121, 152, 182, 213, 244, 274, 305, 335];
const EDGE = { left: 42, right: 10, top: 20, bottom: 22, between: 30 };
const FONT = "11px system-ui, sans-serif";
export const LINES = [
  { name: "solid", dash: [] },
  { name: "dashed", dash: [6, 4] },
  { name: "dotted", dash: [1.5, 3] },
];
const OTHER_COLORS = ["#8da0cb", "#66c2a5", "#fc8d62", "#a6761d", "#7570b3"];

export function bandColor(name, index) {
  const known = Object.hasOwn(BAND_COLORS, name);
  return known ? BAND_COLORS[name] : OTHER_COLORS[index % OTHER_COLORS.length];
}

function range(curves, start) {
  let [low, high] = start;
  for (const { values, series } of curves) {
    values.forEach((value, i) => {
      if (!series.clear[i] || !(Math.abs(value) < 10)) return; // clouds do not set the scale
      low = Math.min(low, value);
      high = Math.max(high, value);
    });
  }
  return [low, high];
}

function ticks([low, high]) {
  const step = [0.05, 0.1, 0.2, 0.25, 0.5, 1, 2].find((one) => (high - low) / one <= 5) ?? 5;
  const out = [];
  for (let value = Math.ceil(low / step) * step; value <= high + 1e-9; value += step)
    out.push(value);
  return out.map((value) => +value.toFixed(2) || 0);
}

// The panels of a plot: where they are, their scale and their curves, those of other years below.
function layPanels(years, hidden, width, height) {
  const [ndvi, bands] = [[], []];
  const names = years[0].series.bands.map((band) => band.name);
  years.forEach(({ series, ndvi: values }, line) => {
    if (values && !hidden.has("NDVI")) ndvi.unshift({ values, series, line });
    for (const band of series.bands) {
      const { name } = band;
      if (!names.includes(name) || hidden.has(name)) continue;
      bands.unshift({ ...band, color: bandColor(name, names.indexOf(name)), series, line });
    }
  });
  const panels = [];
  if (ndvi.length) panels.push({ title: "NDVI", curves: ndvi, share: 1 });
  if (bands.length) panels.push({ title: "surface reflectance", curves: bands, share: 1.35 });
  const room = height - EDGE.top - EDGE.bottom - EDGE.between * (panels.length - 1);
  const total = panels.reduce((sum, panel) => sum + panel.share, 0);
  let top = EDGE.top;
  for (const panel of panels) {
    panel.range = range(panel.curves, panel.title === "NDVI" ? [0, 1] : [0, 0.2]);
    panel.top = top;
    panel.height = (room * panel.share) / total;
    const [low, high] = panel.range;
    panel.y = (v) => panel.top + panel.height * (1 - (v - low) / (high - low));
    top += panel.height + EDGE.between;
  }
  const x = (day) => EDGE.left + ((day - 1) / 365) * (width - EDGE.left - EDGE.right);
  return { panels, x };
}

function drawFrame(pen, panel, ink, width) {
  pen.fillStyle = ink.muted;
  pen.strokeStyle = ink.line;
  pen.lineWidth = 1;
  pen.textAlign = "left";
  pen.fillText(panel.title, EDGE.left, panel.top - 7);
  pen.textAlign = "right";
  for (const tick of ticks(panel.range)) {
    const y = Math.round(panel.y(tick)) + 0.5;
    pen.beginPath();
    pen.moveTo(EDGE.left, y);
    pen.lineTo(width - EDGE.right, y);
    pen.stroke();
    pen.fillText(String(tick), EDGE.left - 6, y + 4);
  }
}

function drawMonths(pen, x, ink, height) {
  pen.fillStyle = ink.muted;
  pen.textAlign = "center";
  STARTS.forEach((day, i) => {
    pen.fillText(MONTHS[i], (x(day) + x(STARTS[i + 1] ?? 366)) / 2, height - 6);
  });
}

function drawCurve(pen, curve, panel, x, ink) {
  const { series, line } = curve;
  const [bottom, top] = [panel.y(panel.range[0]), panel.y(panel.range[1])];
  const place = (i) => [
    x(series.days[i]),
    Math.min(bottom, Math.max(top, panel.y(curve.values[i]))),
  ];
  pen.strokeStyle = pen.fillStyle = curve.color ?? ink.text;
  pen.lineWidth = 1.5;
  pen.setLineDash(LINES[line].dash);
  pen.beginPath();
  series.days.forEach((_, i) => {
    if (series.clear[i] && Number.isFinite(curve.values[i])) pen.lineTo(...place(i));
  });
  pen.stroke();
  pen.setLineDash([]);
  if (line) return; // dates are marked on the map that is shown only
  series.days.forEach((_, i) => {
    if (!Number.isFinite(curve.values[i])) return;
    pen.beginPath();
    pen.globalAlpha = series.clear[i] ? 1 : 0.45;
    pen.arc(...place(i), series.clear[i] ? 2.4 : 2, 0, 7);
    pen.lineWidth = 1;
    if (series.clear[i]) pen.fill();
    else pen.stroke();
  });
  pen.globalAlpha = 1;
}

// Number of the date nearest to a place on the plot.
export function dateAt(series, canvas, left) {
  const day = 1 + ((left - EDGE.left) / (canvas.clientWidth - EDGE.left - EDGE.right)) * 365;
  let best = 0;
  series.days.forEach((one, i) => {
    if (Math.abs(one - day) < Math.abs(series.days[best] - day)) best = i;
  });
  return best;
}

// Plot years over each other. hidden: names of curves that are off; date: number of the date of the
// first year that is pointed at, or -1.
export function drawYear(canvas, years, hidden, date) {
  const [{ series }] = years;
  const style = getComputedStyle(canvas);
  const ink = {
    text: style.getPropertyValue("--text"),
    muted: style.getPropertyValue("--muted"),
    line: style.getPropertyValue("--line"),
  };
  const [width, height, sharp] = [canvas.clientWidth, canvas.clientHeight, devicePixelRatio || 1];
  [canvas.width, canvas.height] = [width * sharp, height * sharp];
  const pen = canvas.getContext("2d");
  pen.scale(sharp, sharp);
  pen.font = FONT;
  const { panels, x } = layPanels(years, hidden, width, height);
  drawMonths(pen, x, ink, height);
  for (const panel of panels) {
    drawFrame(pen, panel, ink, width);
    if (date >= 0) {
      pen.strokeStyle = ink.muted;
      pen.beginPath();
      pen.moveTo(x(series.days[date]), panel.top);
      pen.lineTo(x(series.days[date]), panel.top + panel.height);
      pen.stroke();
    }
    for (const curve of panel.curves) drawCurve(pen, curve, panel, x, ink);
  }
}

// What is known of one date, in words.
export function describeDate(series, ndvi, date, hidden) {
  const day = series.dates[date] ?? `day of year ${series.days[date]}`;
  const say = (name, value, digits) =>
    `${name} ${Number.isFinite(value) ? value.toFixed(digits) : "no data"}`;
  const numbers = series.bands
    .filter((band) => !hidden.has(band.name))
    .map((band) => say(band.name, band.values[date], 3));
  if (ndvi && !hidden.has("NDVI")) numbers.unshift(say("NDVI", ndvi[date], 2));
  return `${day}, ${series.clear[date] ? "clear" : "cloudy"}: ${numbers.join(", ")}`;
}
