// The map: pan, zoom, pick and brush with mouse, fingers and keys.
import { scaleBar } from "./geo.js";
import { placeOf } from "./files.js";

const TAP = 6; // screen pixels that a click may move
const MAX_MARKS = 4000; // of labels on the map
const MIN_ZOOM = 0.02;
const MAX_ZOOM = 64;
const NEAR = 4; // zoom, at least, to look at one pixel
// screen pixels that tools and scale bar take from a wide and a narrow screen
const WIDE = { left: 78, right: 20, top: 20, bottom: 62 };
const NARROW = { left: 10, right: 10, top: 60, bottom: 54 };
const MOVES = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

export class MapView {
  // on: {hover({row, column} or null), pick(row, column), drawn(),
  // stroke("begin" | "paint" | "end", row, column)}.
  constructor(canvas, on) {
    this.canvas = canvas;
    this.on = on;
    this.layers = []; // {image, opacity}, from the ground up
    this.marks = []; // {row, column, color}
    this.pixel = null; // {row, column} that is looked at
    this.cursor = null; // {row, column} of mouse or keys
    this.brush = 0; // its radius in pixels
    this.tool = "look";
    this.pointers = new Map();
    this.waits = false;
    new ResizeObserver(() => this.draw()).observe(canvas);
    this.#listen();
  }

  // Show a scene; stay: at the place and zoom of the one before.
  show(scene, stay = false) {
    stay &&= Boolean(this.scene);
    this.scene = scene;
    this.cursor = null;
    if (stay) this.draw();
    else this.fit();
  }

  // ---- view ----

  // Show the whole scene, not covered by tools, legend and scale bar.
  fit() {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    const { scene } = this;
    const edge = width > 640 ? WIDE : NARROW;
    const [across, down] = [width - edge.left - edge.right, height - edge.top - edge.bottom];
    this.zoom = Math.max(MIN_ZOOM, Math.min(across / scene.width, down / scene.height));
    this.x = scene.width / 2 - (edge.left - edge.right) / 2 / this.zoom;
    this.y = scene.height / 2 - (edge.top - edge.bottom) / 2 / this.zoom;
    this.draw();
  }

  // Zoom by a factor about a place of the screen.
  zoomBy(factor, left = this.canvas.clientWidth / 2, top = this.canvas.clientHeight / 2) {
    const before = this.#toMap(left, top);
    this.zoom = Math.max(MIN_ZOOM, Math.min(MAX_ZOOM, this.zoom * factor));
    const after = this.#toMap(left, top);
    this.x += before[0] - after[0];
    this.y += before[1] - after[1];
    this.draw();
  }

  // Bring a pixel to the middle, large enough to be seen.
  center({ row, column }) {
    [this.x, this.y] = [column + 0.5, row + 0.5];
    this.zoom = Math.max(this.zoom, NEAR);
    this.draw();
  }

  #toMap(left, top) {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    return [this.x + (left - width / 2) / this.zoom, this.y + (top - height / 2) / this.zoom];
  }

  // Left and top on the screen of a place on the map.
  toScreen(x, y) {
    const { clientWidth: width, clientHeight: height } = this.canvas;
    return [(x - this.x) * this.zoom + width / 2, (y - this.y) * this.zoom + height / 2];
  }

  #pixelAt(left, top) {
    const [x, y] = this.#toMap(left, top).map(Math.floor);
    return x >= 0 && y >= 0 && x < this.scene.width && y < this.scene.height
      ? { row: y, column: x }
      : null;
  }

  // ---- mouse, fingers, keys ----

  #listen() {
    const { canvas } = this;
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerup", (event) => this.#up(event));
    canvas.addEventListener("pointercancel", (event) => this.#up(event, true));
    canvas.addEventListener("pointerleave", () => this.#hover(null));
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => this.#hover(null));
    const wheel = (event) => {
      event.preventDefault();
      const lines = event.deltaMode === 1 ? 20 : 1;
      this.zoomBy(Math.exp(-event.deltaY * lines * 0.0015), event.offsetX, event.offsetY);
    };
    canvas.addEventListener("wheel", wheel, { passive: false });
  }

  get #brushes() {
    return this.tool === "brush" || this.tool === "erase";
  }

  #down(event) {
    this.canvas.setPointerCapture(event.pointerId);
    const place = { left: event.offsetX, top: event.offsetY, far: 0 };
    this.pointers.set(event.pointerId, place);
    const pixel = this.#pixelAt(place.left, place.top);
    const paints = this.#brushes && event.button === 0 && !event.shiftKey;
    if (this.pointers.size > 1 && this.painting) this.#stroke("end");
    if (this.pointers.size === 1 && paints && pixel) {
      this.#stroke("begin");
      this.#stroke("paint", pixel);
    }
  }

  #stroke(phase, pixel) {
    this.painting = phase !== "end";
    this.on.stroke(phase, pixel?.row, pixel?.column);
  }

  #move(event) {
    const place = this.pointers.get(event.pointerId);
    const [left, top] = [event.offsetX, event.offsetY];
    this.#hover(this.#pixelAt(left, top));
    if (!place) return;
    const [dx, dy] = [left - place.left, top - place.top];
    const others = [...this.pointers].filter(([id]) => id !== event.pointerId);
    if (others.length) this.#pinch(place, others[0][1], left, top);
    else if (this.painting) this.#paintTo(place, left, top);
    else {
      if (place.far < TAP && place.far + Math.hypot(dx, dy) < TAP) return;
      this.x -= dx / this.zoom;
      this.y -= dy / this.zoom;
      this.draw();
    }
    place.far += Math.hypot(dx, dy);
    [place.left, place.top] = [left, top];
  }

  // Paint all pixels between the last place and this one.
  #paintTo(place, left, top) {
    const steps = Math.ceil(Math.hypot(left - place.left, top - place.top) / this.zoom) || 1;
    for (let i = 1; i <= steps; i++) {
      const [x, y] = [left, top].map((end, j) => {
        const start = j ? place.top : place.left;
        return start + ((end - start) * i) / steps;
      });
      const pixel = this.#pixelAt(x, y);
      if (pixel) this.#stroke("paint", pixel);
    }
  }

  #pinch(place, other, left, top) {
    const spread = (x, y) => Math.hypot(x - other.left, y - other.top) || 1;
    const [x, y] = [(left + other.left) / 2, (top + other.top) / 2];
    this.x -= (left - place.left) / 2 / this.zoom;
    this.y -= (top - place.top) / 2 / this.zoom;
    this.zoomBy(spread(left, top) / spread(place.left, place.top), x, y);
    place.far = other.far = TAP + 1;
  }

  #up(event, cancelled = false) {
    const place = this.pointers.get(event.pointerId);
    this.pointers.delete(event.pointerId);
    if (this.painting) return this.#stroke("end");
    const pixel = this.#pixelAt(event.offsetX, event.offsetY);
    const tapped = place && place.far < TAP && event.button === 0 && !cancelled;
    if (tapped && pixel && !this.#brushes) this.on.pick(pixel.row, pixel.column);
  }

  #key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const move = MOVES[event.key];
    if (move) {
      event.preventDefault();
      this.#moveCursor(move, event.shiftKey ? 10 : 1);
    } else if ((event.key === "Enter" || event.key === " ") && this.cursor) {
      event.preventDefault();
      const { row, column } = this.cursor;
      if (!this.#brushes) return this.on.pick(row, column);
      for (const phase of ["begin", "paint", "end"]) this.#stroke(phase, this.cursor);
    }
  }

  #moveCursor([down, right], step) {
    const { scene } = this;
    const start = this.cursor ??
      this.pixel ?? {
        row: Math.floor(Math.max(0, Math.min(scene.height - 1, this.y))),
        column: Math.floor(Math.max(0, Math.min(scene.width - 1, this.x))),
      };
    const within = (value, size) => Math.max(0, Math.min(size - 1, value));
    const row = within(start.row + down * step, scene.height);
    const column = within(start.column + right * step, scene.width);
    const [left, top] = this.toScreen(column + 0.5, row + 0.5);
    const { clientWidth: width, clientHeight: height } = this.canvas;
    if (left < 40 || left > width - 40) this.x = column + 0.5;
    if (top < 40 || top > height - 40) this.y = row + 0.5;
    this.#hover({ row, column });
  }

  #hover(pixel) {
    this.cursor = pixel;
    this.on.hover(pixel);
    this.draw();
  }

  // ---- drawing ----

  // Ask for a picture with the next frame.
  draw() {
    if (this.waits || !this.scene) return;
    this.waits = true;
    requestAnimationFrame(() => {
      this.waits = false;
      this.#paint();
    });
  }

  #paint() {
    const { canvas, scene, zoom } = this;
    const [width, height, sharp] = [canvas.clientWidth, canvas.clientHeight, devicePixelRatio || 1];
    const [wide, high] = [Math.round(width * sharp), Math.round(height * sharp)];
    if (canvas.width !== wide || canvas.height !== high)
      [canvas.width, canvas.height] = [wide, high];
    const pen = canvas.getContext("2d");
    pen.setTransform(sharp, 0, 0, sharp, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.imageSmoothingEnabled = zoom < 1;
    pen.imageSmoothingQuality = "high";
    const corner = this.toScreen(0, 0);
    for (const { image, opacity } of this.layers) {
      pen.globalAlpha = opacity;
      pen.drawImage(image, ...corner, scene.width * zoom, scene.height * zoom);
    }
    pen.globalAlpha = 1;
    this.#drawMarks(pen);
    if (this.pixel) this.#drawPixel(pen, this.pixel);
    if (this.cursor) this.#drawCursor(pen);
    this.on.drawn();
  }

  #drawMarks(pen) {
    const radius = this.marks.length > 500 ? 3 : 4.5;
    for (const { row, column, color } of this.marks.slice(0, MAX_MARKS)) {
      const [left, top] = this.toScreen(column + 0.5, row + 0.5);
      pen.beginPath();
      pen.arc(left, top, radius, 0, 7);
      pen.fillStyle = color;
      pen.fill();
      pen.lineWidth = 3;
      pen.strokeStyle = "#000000";
      pen.globalAlpha = 0.55;
      pen.stroke();
      pen.globalAlpha = 1;
      pen.lineWidth = 1.5;
      pen.strokeStyle = "#ffffff";
      pen.stroke();
    }
  }

  // A ring and a cross in black and white, seen on any ground.
  #drawPixel(pen, { row, column }) {
    const [left, top] = this.toScreen(column + 0.5, row + 0.5);
    const radius = Math.max(9, this.zoom * 0.9);
    for (const [width, color] of [
      [4, "#000000"],
      [2, "#ffffff"],
    ]) {
      pen.lineWidth = width;
      pen.strokeStyle = color;
      pen.beginPath();
      pen.arc(left, top, radius, 0, 7);
      for (const [x, y] of [
        [1, 0],
        [-1, 0],
        [0, 1],
        [0, -1],
      ]) {
        pen.moveTo(left + x * radius, top + y * radius);
        pen.lineTo(left + x * (radius + 7), top + y * (radius + 7));
      }
      pen.stroke();
    }
  }

  #drawCursor(pen) {
    const { row, column } = this.cursor;
    const [left, top] = this.toScreen(column, row);
    pen.lineWidth = 1;
    pen.strokeStyle = "#ffffff";
    pen.globalCompositeOperation = "difference";
    if (this.#brushes) {
      pen.beginPath();
      const radius = (this.brush + 0.5) * this.zoom;
      pen.arc(left + this.zoom / 2, top + this.zoom / 2, Math.max(radius, 3), 0, 7);
      pen.stroke();
    } else {
      pen.strokeRect(left, top, Math.max(this.zoom, 3), Math.max(this.zoom, 3));
    }
    pen.globalCompositeOperation = "source-over";
  }

  // ---- for others ----

  // Marks for the labels on the scene that is shown.
  mark(labels) {
    this.marks = [];
    for (const [pixel, { code }] of labels.byPixel) {
      if (pixel < this.scene.first || pixel >= this.scene.first + this.scene.size) continue;
      const [row, column] = placeOf(this.scene, pixel);
      this.marks.push({ row, column, color: labels.classOf(code).color });
    }
    this.draw();
  }

  bar(maxWidth) {
    return scaleBar(this.scene, this.zoom, maxWidth);
  }
}
