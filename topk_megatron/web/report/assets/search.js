// Which neurons a search wants, and in which order. Neurons are numbered layer by layer.

const COMPARISONS = {
  '<': (a, b) => a < b, '<=': (a, b) => a <= b, '>': (a, b) => a > b, '>=': (a, b) => a >= b, '=': (a, b) => a === b,
};

// data: {width, layers, measures Map(key -> Float32Array), tops Int32Array, perNeuron, vocabulary}
// Returns {tests, error}: a neuron is wanted if every test of its number holds.
function parseSearch(query, data) {
  const tests = [];
  for (const term of query.match(/"[^"]*"|\S+/g) || []) {
    const pair = /^L?(\d+):N?(\d+)$/i.exec(term);
    const comparison = /^([a-z_]+)(<=|>=|<|>|=)(-?[\d.]+(?:e-?\d+)?)$/i.exec(term);
    if (pair) {
      const place = data.layers.indexOf(Number(pair[1]));
      if (place < 0) return { error: `Layer ${pair[1]} is not in this report; its layers are ${data.layers.join(', ')}.` };
      if (Number(pair[2]) >= data.width) return { error: `Neuron ${pair[2]} is out of range; there are ${number(data.width)} in a layer, from 0.` };
      const wanted = place * data.width + Number(pair[2]);
      tests.push((neuron) => neuron === wanted);
    } else if (comparison) {
      const values = data.measures.get(comparison[1].toLowerCase());
      if (!values) return { error: `There is no measure ${comparison[1]}; there are ${[...data.measures.keys()].join(', ')}.` };
      const holds = COMPARISONS[comparison[2]];
      const limit = Math.fround(Number(comparison[3]));
      if (Number.isNaN(limit)) return { error: `${comparison[3]} is not a number.` };
      tests.push((neuron) => holds(values[neuron], limit));
    } else tests.push(tokenTest(term, data));
  }
  return { tests };
}

function tokenTest(term, data) {
  const whole = term.length > 1 && term.startsWith('"') && term.endsWith('"');
  const text = (whole ? term.slice(1, -1) : term).toLowerCase().trim();
  const matching = new Uint8Array(data.vocabulary.length);
  data.vocabulary.forEach((token, i) => {
    const lower = token.toLowerCase();
    matching[i] = whole ? lower.trim() === text : lower.includes(text);
  });
  return (neuron) => {
    for (let i = neuron * data.perNeuron; i < (neuron + 1) * data.perNeuron; i += 1) {
      if (data.tops[i] >= 0 && matching[data.tops[i]]) return true;
    }
    return false;
  };
}

// Numbers of the wanted neurons, ordered by a measure; those without a value come last.
function findNeurons(query, layerPlace, key, descending, data) {
  const { tests, error } = parseSearch(query, data);
  if (error) return { error };
  const start = layerPlace === null ? 0 : layerPlace * data.width;
  const stop = layerPlace === null ? data.layers.length * data.width : start + data.width;
  const found = [];
  for (let neuron = start; neuron < stop; neuron += 1) {
    if (tests.every((test) => test(neuron))) found.push(neuron);
  }
  const order = Uint32Array.from(found);
  const values = data.measures.get(key);
  if (values) {
    const sign = descending ? -1 : 1;
    const rank = (neuron) => (Number.isNaN(values[neuron]) ? Infinity : sign * values[neuron]);
    order.sort((a, b) => {
      const [one, two] = [rank(a), rank(b)];
      return one === two ? a - b : one < two ? -1 : 1;
    });
  }
  return { order };
}
