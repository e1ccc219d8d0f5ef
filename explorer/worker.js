// One worker: it owns a stretch of all pixels and answers {id, task, ...} with {id, answer}.
import { predict, score, similarity, train } from "./learn.js";

let store = null;

const TASKS = {
  load: ({ values, scales, size }) => {
    store = { values, scales, size };
    return true;
  },
  similarity: ({ vector, about }) => similarity(store, vector, about),
  train: ({ training }) => train(training),
  predict: ({ model }) => predict(store, model),
  score: ({ training }) => score(training),
};

self.onmessage = ({ data }) => {
  try {
    const answer = TASKS[data.task](data);
    const arrays = ArrayBuffer.isView(answer) ? [answer] : Object.values(answer);
    const moved = data.task === "predict" || data.task === "similarity" ? arrays : [];
    self.postMessage(
      { id: data.id, answer },
      moved.map((array) => array.buffer),
    );
  } catch (error) {
    self.postMessage({ id: data.id, error: String(error) });
  }
};
