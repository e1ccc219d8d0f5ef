// Learning from labels: cosine similarity, k nearest neighbours, linear softmax. Knows no page.
// Shapes: n pixels, K dimensions, m labelled pixels, C classes. A store holds quantised pixels:
// {values: Int8Array (n * K), scales: Float32Array (n), NaN where no data, size: K}.

export const NO_DATA = 255; // in place of a class where there is nothing to classify
const FOLDS = 5;
const MEMORY = 8; // pairs that L-BFGS remembers

// ---- similarity ---------------------------------------------------------------------------------

// Length of every pixel's vector; offset (K) and rest put the mean back in that PCA took away.
function lengths(store, offset, rest) {
  const { values, scales, size } = store;
  const out = new Float32Array(scales.length);
  for (let pixel = 0, at = 0; pixel < scales.length; pixel++) {
    const scale = scales[pixel];
    let sum = rest;
    for (let k = 0; k < size; k++, at++) {
      const value = values[at] * scale + offset[k];
      sum += value * value;
    }
    out[pixel] = Math.sqrt(sum);
  }
  return out;
}

// Cosine of every pixel to one vector (K): Float32Array (n), NaN where no data.
// about: {offset, rest} of the mean to put back; zeros compare with the map's mean as origin.
export function similarity(store, vector, about) {
  const { values, scales, size } = store;
  const { offset, rest } = about;
  store.lengths ??= new Map();
  if (!store.lengths.has(about.name)) store.lengths.set(about.name, lengths(store, offset, rest));
  const length = store.lengths.get(about.name);
  const query = new Float32Array(size);
  let own = rest;
  let constant = rest;
  for (let k = 0; k < size; k++) {
    query[k] = vector[k] + offset[k];
    own += query[k] * query[k];
    constant += query[k] * offset[k];
  }
  const norm = 1 / Math.sqrt(own || 1);
  const out = new Float32Array(scales.length);
  for (let pixel = 0, at = 0; pixel < scales.length; pixel++, at += size) {
    let dot = 0;
    for (let k = 0; k < size; k++) dot += values[at + k] * query[k];
    out[pixel] = ((dot * scales[pixel] + constant) * norm) / (length[pixel] || 1);
  }
  return out;
}

// ---- products with many rows --------------------------------------------------------------------

// Rows of numbers, four side by side, as `multiply` reads them fastest.
function packRows(wanted, size, at) {
  const count = Math.ceil(wanted / 4) * 4;
  const values = new Float64Array(count * size);
  for (let row = 0; row < wanted; row++) {
    const start = (row - (row % 4)) * size + (row % 4);
    for (let d = 0; d < size; d++) values[start + 4 * d] = at(row, d);
  }
  return { count, values };
}

// Dot products of a vector with all rows, into `out` (count).
function multiply({ count, values }, vector, out) {
  const size = vector.length;
  for (let row = 0, at = 0; row < count; row += 4) {
    let [a, b, c, e] = [0, 0, 0, 0];
    for (let d = 0; d < size; d++, at += 4) {
      const value = vector[d];
      a += value * values[at];
      b += value * values[at + 1];
      c += value * values[at + 2];
      e += value * values[at + 3];
    }
    out[row] = a;
    out[row + 1] = b;
    out[row + 2] = c;
    out[row + 3] = e;
  }
}

// The int8 values of a pixel into `vector`; false where there is no data.
function readPixel({ values, scales, size }, pixel, vector) {
  for (let d = 0, at = pixel * size; d < size; d++, at++) vector[d] = values[at];
  return scales[pixel] >= 0;
}

// ---- linear softmax -----------------------------------------------------------------------------

function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

// L-BFGS's direction: minus the gradient times an inverse curvature, which is estimated from the
// last pairs of steps and changes of the gradient.
function direction(gradient, pairs) {
  const d = gradient.map((value) => -value);
  const shares = [];
  for (let i = pairs.length - 1; i >= 0; i--) {
    const { step, change, inverse } = pairs[i];
    shares[i] = inverse * dot(step, d);
    for (let j = 0; j < d.length; j++) d[j] -= shares[i] * change[j];
  }
  if (pairs.length) {
    const { change, inverse } = pairs[pairs.length - 1];
    const scale = 1 / (inverse * dot(change, change));
    for (let j = 0; j < d.length; j++) d[j] *= scale;
  }
  pairs.forEach(({ step, change, inverse }, i) => {
    const back = shares[i] - inverse * dot(change, d);
    for (let j = 0; j < d.length; j++) d[j] += back * step[j];
  });
  return d;
}

// Minimise a smooth convex function by L-BFGS with a halving line search, from x = 0.
// objective(x, gradient) fills the gradient and returns the value.
export function minimise(objective, size, { iterations = 200, tolerance = 1e-4 } = {}) {
  let x = new Float64Array(size);
  let gradient = new Float64Array(size);
  let value = objective(x, gradient);
  const enough = tolerance * Math.max(1, Math.sqrt(dot(gradient, gradient)));
  const pairs = [];
  for (let i = 0; i < iterations && dot(gradient, gradient) > enough ** 2; i++) {
    const d = direction(gradient, pairs);
    const slope = dot(gradient, d);
    let length = pairs.length ? 1 : 1 / Math.max(1, Math.sqrt(-slope));
    let next, nextGradient, nextValue;
    do {
      next = x.map((start, j) => start + length * d[j]);
      nextGradient = new Float64Array(size);
      nextValue = objective(next, nextGradient);
      length /= 2;
    } while (!(nextValue <= value + 2e-4 * length * slope) && length > 1e-12);
    const step = next.map((end, j) => end - x[j]);
    const change = nextGradient.map((end, j) => end - gradient[j]);
    const curvature = dot(step, change);
    if (curvature > 0) pairs.push({ step, change, inverse: 1 / curvature });
    if (pairs.length > MEMORY) pairs.shift();
    [x, gradient, value] = [next, nextGradient, nextValue];
  }
  return x;
}

// Cross-entropy of a linear softmax plus half the squared weights (scikit-learn's C = 1).
// x holds C rows of K weights and a bias, which is free.
function softmaxLoss(x, gradient, features, target, classes, size) {
  const width = size + 1;
  const logits = new Float64Array(classes);
  let loss = 0;
  for (let row = 0, at = 0; row < target.length; row++, at += size) {
    let max = -Infinity;
    for (let c = 0; c < classes; c++) {
      let sum = x[c * width + size];
      for (let k = 0; k < size; k++) sum += x[c * width + k] * features[at + k];
      logits[c] = sum;
      if (sum > max) max = sum;
    }
    let total = 0;
    for (let c = 0; c < classes; c++) total += Math.exp(logits[c] - max);
    loss += max + Math.log(total) - logits[target[row]];
    for (let c = 0; c < classes; c++) {
      const error = Math.exp(logits[c] - max) / total - (c === target[row] ? 1 : 0);
      for (let k = 0; k < size; k++) gradient[c * width + k] += error * features[at + k];
      gradient[c * width + size] += error;
    }
  }
  for (let j = 0; j < x.length; j++) {
    if (j % width === size) continue;
    loss += 0.5 * x[j] * x[j];
    gradient[j] += x[j];
  }
  return loss;
}

function trainSoftmax(training) {
  const { vectors, target, classes, size, deviation } = training;
  const features = vectors.map((value) => value / deviation);
  const objective = (x, gradient) => softmaxLoss(x, gradient, features, target, classes, size);
  const x = minimise(objective, classes * (size + 1));
  // divided once more here, so that the weights take the vectors as they are
  const weights = Float32Array.from(x, (w, j) => (j % (size + 1) === size ? w : w / deviation));
  return { method: "softmax", weights, classes };
}

// A function that gives the logits (C, and maybe zeros) of a pixel; null where it has no data.
function linear(store, { weights, classes }) {
  const { scales, size } = store;
  const rows = packRows(classes, size, (c, k) => weights[c * (size + 1) + k]);
  const [vector, logits] = [new Float64Array(size), new Float64Array(rows.count)];
  return (pixel) => {
    if (!readPixel(store, pixel, vector)) return null;
    multiply(rows, vector, logits);
    for (let c = 0; c < classes; c++) {
      logits[c] = logits[c] * scales[pixel] + weights[c * (size + 1) + size];
    }
    return logits;
  };
}

// Class, its probability and that less the second class's (0..255) of the pixels of a store.
function predictSoftmax(store, model) {
  const { classes, temperature = 1 } = model;
  const out = emptyMap(store.scales.length);
  const logitsOf = linear(store, model);
  for (let pixel = 0; pixel < store.scales.length; pixel++) {
    const logits = logitsOf(pixel);
    if (!logits) continue;
    let [max, second] = [-Infinity, -Infinity];
    let best = 0;
    for (let c = 0; c < classes; c++) {
      if (logits[c] > max) {
        [second, max] = [max, logits[c]];
        best = c;
      } else if (logits[c] > second) second = logits[c];
    }
    let total = 0;
    for (let c = 0; c < classes; c++) total += Math.exp((logits[c] - max) / temperature);
    out.classes[pixel] = best;
    out.confidence[pixel] = Math.round(255 / total);
    out.margin[pixel] = Math.round((255 * (1 - Math.exp((second - max) / temperature))) / total);
  }
  return out;
}

// Cross-entropy of logits that are divided by a temperature: rows {logits, label, weight}.
function heldOutLoss(rows, temperature) {
  let loss = 0;
  for (const { logits, label, weight } of rows) {
    const max = Math.max(...logits);
    let total = 0;
    for (const value of logits) total += Math.exp((value - max) / temperature);
    loss += weight * ((max - logits[label]) / temperature + Math.log(total));
  }
  return loss;
}

// The temperature of held-out labels, as `fit_temperature` of evaluation/calibration.py has it; by
// golden sections of its logarithm.
export function fitTemperature(rows) {
  const loss = (log) => heldOutLoss(rows, Math.exp(log)) + log ** 2;
  let [low, high] = [Math.log(0.1), Math.log(10)];
  const part = (Math.sqrt(5) - 1) / 2;
  while (high - low > 1e-3) {
    const [left, right] = [high - part * (high - low), low + part * (high - low)];
    if (loss(left) < loss(right)) high = right;
    else low = left;
  }
  return Math.exp((low + high) / 2);
}

// ---- k nearest neighbours -----------------------------------------------------------------------

// The most frequent class of the k nearest labelled vectors (the first of equals), and its share.
function predictNearest(store, { vectors, target, classes, k }) {
  const { scales, size } = store;
  const out = emptyMap(scales.length);
  const count = Math.min(k, target.length);
  const rows = packRows(target.length, size, (row, d) => vectors[row * size + d]);
  const lengths = new Float64Array(target.length);
  vectors.forEach((value, i) => (lengths[Math.floor(i / size)] += value * value));
  const [vector, products] = [new Float64Array(size), new Float64Array(rows.count)];
  const near = { distances: new Float64Array(count), rows: new Int32Array(count) };
  const votes = new Int32Array(classes);
  for (let pixel = 0; pixel < scales.length; pixel++) {
    if (!readPixel(store, pixel, vector)) continue;
    multiply(rows, vector, products);
    keepNearest(lengths, products, 2 * scales[pixel], near);
    votes.fill(0);
    let best = 0;
    for (let i = 0; i < count; i++) votes[target[near.rows[i]]]++;
    for (let c = 1; c < classes; c++) if (votes[c] > votes[best]) best = c;
    out.classes[pixel] = best;
    out.confidence[pixel] = Math.round((255 * votes[best]) / count);
    const second = votes.reduce((most, vote, c) => (c === best ? most : Math.max(most, vote)), 0);
    out.margin[pixel] = Math.round((255 * (votes[best] - second)) / count);
  }
  return out;
}

// The nearest rows, by |row|^2 - 2 pixel . row: the squared distance less the pixel's own length.
function keepNearest(lengths, products, twice, { distances, rows }) {
  const last = distances.length - 1;
  distances.fill(Infinity);
  for (let row = 0; row < lengths.length; row++) {
    const distance = lengths[row] - twice * products[row];
    if (distance >= distances[last]) continue;
    let slot = last;
    for (; slot > 0 && distances[slot - 1] > distance; slot--) {
      distances[slot] = distances[slot - 1];
      rows[slot] = rows[slot - 1];
    }
    distances[slot] = distance;
    rows[slot] = row;
  }
}

function emptyMap(pixels) {
  const [confidence, margin] = [new Uint8Array(pixels), new Uint8Array(pixels)];
  return { classes: new Uint8Array(pixels).fill(NO_DATA), confidence, margin };
}

// ---- both ---------------------------------------------------------------------------------------

// A model of labelled pixels: {vectors: Float32Array (m * K), target: Uint8Array (m) of class
// numbers, classes: C, size: K, deviation, method: "softmax" or "nearest", k}.
export function train(training) {
  return training.method === "softmax" ? trainSoftmax(training) : { ...training };
}

export function predict(store, model) {
  return model.method === "softmax" ? predictSoftmax(store, model) : predictNearest(store, model);
}

// Fold of each click, so that each fold has its share of every class; -1 for a class of one click.
// clicks: class number of each click.
export function chooseFolds(clicks) {
  const counts = new Map();
  const folds = clicks.map((label) => {
    const seen = counts.get(label) ?? 0;
    counts.set(label, seen + 1);
    return (seen + label) % FOLDS;
  });
  return folds.map((fold, i) => (counts.get(clicks[i]) > 1 ? fold : -1));
}

// Score every click by a model that has not seen it: a fifth of the clicks is held out at a time.
// training.click: (m) number of the click that drew each labelled pixel.
// Returns {clicks, right, perClass: [{clicks, right}], temperature (of softmax)}; a stroke of the
// brush counts as one click and is right as far as its pixels are.
export function score(training) {
  const { vectors, target, click, size, classes } = training;
  const clickClass = [];
  target.forEach((label, row) => (clickClass[click[row]] = label));
  const folds = chooseFolds(clickClass);
  const perClass = Array.from({ length: classes }, () => ({ clicks: 0, right: 0 }));
  const sums = clickClass.map(() => ({ pixels: 0, right: 0 }));
  const seen = []; // of softmax: held-out rows and their logits
  for (let fold = 0; fold < FOLDS; fold++) {
    const held = rowsWhere(target, (row) => folds[click[row]] === fold);
    const kept = rowsWhere(target, (row) => folds[click[row]] !== fold);
    if (!held.length || !kept.length) continue;
    const model = train({ ...training, ...takeRows(training, kept) });
    const store = exactStore(takeRows(training, held).vectors, size);
    const found = predict(store, model);
    const logitsOf = model.method === "softmax" ? linear(store, model) : null;
    held.forEach((row, i) => {
      if (logitsOf) seen.push({ row, logits: logitsOf(i).slice(0, classes), label: target[row] });
      sums[click[row]].pixels++;
      sums[click[row]].right += found.classes[i] === target[row] ? 1 : 0;
    });
  }
  sums.forEach(({ pixels, right }, i) => {
    if (!pixels) return;
    perClass[clickClass[i]].clicks++;
    perClass[clickClass[i]].right += right / pixels;
  });
  const total = (key) => perClass.reduce((sum, entry) => sum + entry[key], 0);
  const rows = seen.map((one) => ({ ...one, weight: 1 / sums[click[one.row]].pixels }));
  const temperature = fitTemperature(rows); // of no rows 1
  return { clicks: total("clicks"), right: total("right"), perClass, temperature };
}

function rowsWhere(target, wanted) {
  return Array.from(target.keys()).filter(wanted);
}

function takeRows({ vectors, target, size }, rows) {
  const taken = new Float32Array(rows.length * size);
  rows.forEach((row, i) => taken.set(vectors.subarray(row * size, (row + 1) * size), i * size));
  return { vectors: taken, target: Uint8Array.from(rows, (row) => target[row]) };
}

// Vectors that are not quantised, in the form of a store.
function exactStore(vectors, size) {
  return { values: vectors, scales: new Float32Array(vectors.length / size).fill(1), size };
}
