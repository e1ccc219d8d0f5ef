// Workers that share all pixels of the page among them.

export class Pool {
  // source: the worker's JavaScript; count: of workers.
  constructor(source, count) {
    const url = URL.createObjectURL(new Blob([source], { type: "text/javascript" }));
    this.workers = Array.from({ length: count }, () => new Worker(url));
    this.waiting = new Map();
    this.asked = 0;
    for (const worker of this.workers) worker.onmessage = ({ data }) => this.#receive(data);
  }

  #receive({ id, answer, error }) {
    const { resolve, reject } = this.waiting.get(id);
    this.waiting.delete(id);
    if (error) reject(new Error(error));
    else resolve(answer);
  }

  #ask(worker, message, moved = []) {
    const id = this.asked++;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      worker.postMessage({ ...message, id }, moved);
    });
  }

  // Give each worker its stretch of the pixels: values (N * K) int8, scales (N).
  load(values, scales, size) {
    const each = Math.ceil(scales.length / this.workers.length);
    return Promise.all(
      this.workers.map((worker, i) => {
        const part = values.slice(i * each * size, (i + 1) * each * size);
        const partScales = scales.slice(i * each, (i + 1) * each);
        const message = { task: "load", values: part, scales: partScales, size };
        return this.#ask(worker, message, [part.buffer, partScales.buffer]);
      }),
    );
  }

  // Ask all workers; their answers in the order of the pixels.
  all(message) {
    return Promise.all(this.workers.map((worker) => this.#ask(worker, message)));
  }

  // Ask the first worker alone.
  one(message) {
    return this.#ask(this.workers[0], message);
  }
}

// One typed array of many.
export function concatenate(arrays) {
  if (arrays.length === 1) return arrays[0];
  const size = arrays.reduce((sum, array) => sum + array.length, 0);
  const out = new arrays[0].constructor(size);
  let at = 0;
  for (const array of arrays) {
    out.set(array, at);
    at += array.length;
  }
  return out;
}
