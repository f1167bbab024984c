// Finds the neurons that match a search, and orders them. `data` is what unpackNeurons returns.

const COMPARISONS = {
  '<': (a, b) => a < b, '<=': (a, b) => a <= b, '>': (a, b) => a > b, '>=': (a, b) => a >= b,
  '=': (a, b) => a === b,
};
const PAIR = /^L?(\d+):N?(\d+)$/i;
const COMPARISON = /^([a-z_]+)(<=|>=|<|>|=)(-?[\d.]+(?:e-?\d+)?)$/i;

// Returns {order}, the numbers of the matching neurons, or {error}. Neurons are ordered by the
// measure `key`; those without a value come last.
function findNeurons(query, layerPlace, key, descending, data) {
  const tests = [];
  for (const term of query.match(/"[^"]*"|\S+/g) || []) {
    const { test, error } = parseTerm(term, data);
    if (error) return { error };
    tests.push(test);
  }
  const start = layerPlace === null ? 0 : layerPlace * data.width;
  const stop = layerPlace === null ? data.layers.length * data.width : start + data.width;
  const found = [];
  for (let neuron = start; neuron < stop; neuron += 1) {
    if (tests.every((test) => test(neuron))) found.push(neuron);
  }
  return { order: ordered(Uint32Array.from(found), data.measures.get(key), descending) };
}

function ordered(neurons, values, descending) {
  if (!values) return neurons;
  const sign = descending ? -1 : 1;
  const rank = (neuron) => (Number.isNaN(values[neuron]) ? Infinity : sign * values[neuron]);
  return neurons.sort((a, b) => {
    const [one, two] = [rank(a), rank(b)];
    if (one === two) return a - b;
    return one < two ? -1 : 1;
  });
}

// Returns {test}, which says of a neuron's number whether it matches, or {error}.
function parseTerm(term, data) {
  const pair = PAIR.exec(term);
  if (pair) return pairTest(Number(pair[1]), Number(pair[2]), data);
  const comparison = COMPARISON.exec(term);
  if (comparison) return measureTest(comparison.slice(1), data);
  return { test: tokenTest(term, data) };
}

function pairTest(layer, neuron, { layers, width }) {
  const place = layers.indexOf(layer);
  if (place < 0) {
    return { error: `Layer ${layer} is not in this report; its layers are ${layers.join(', ')}.` };
  }
  if (neuron >= width) {
    const last = number(width - 1);
    return { error: `Neuron ${neuron} is out of range; a layer has neurons 0 to ${last}.` };
  }
  return { test: (candidate) => candidate === place * width + neuron };
}

function measureTest([name, comparison, text], { measures }) {
  const values = measures.get(name.toLowerCase());
  if (!values) {
    return { error: `There is no measure ${name}; there are ${[...measures.keys()].join(', ')}.` };
  }
  const limit = Math.fround(Number(text));
  if (Number.isNaN(limit)) return { error: `${text} is not a number.` };
  const holds = COMPARISONS[comparison];
  return { test: (neuron) => holds(values[neuron], limit) };
}

function tokenTest(term, { vocabulary, tops, perNeuron }) {
  const whole = term.length > 1 && term.startsWith('"') && term.endsWith('"');
  const text = (whole ? term.slice(1, -1) : term).toLowerCase().trim();
  const matching = Uint8Array.from(vocabulary, (token) => {
    const lower = token.toLowerCase();
    return whole ? lower.trim() === text : lower.includes(text);
  });
  return (neuron) => {
    for (let i = neuron * perNeuron; i < (neuron + 1) * perNeuron; i += 1) {
      if (tops[i] >= 0 && matching[tops[i]]) return true;
    }
    return false;
  };
}
