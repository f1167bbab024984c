// The report's data elements, each of which holds base64 of gzip.

async function unpackBytes(id) {
  const element = byId(id);
  if (!element) return null;
  const text = atob(element.textContent);
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) packed[i] = text.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new Response(stream).arrayBuffer();
}

async function unpackText(id) {
  const bytes = await unpackBytes(id);
  return bytes && new TextDecoder().decode(bytes);
}

async function unpackJson(id) {
  const text = await unpackText(id);
  return text === null ? null : JSON.parse(text);
}

// What the list and the search need of all neurons, which are numbered layer by layer:
// {width, layers, measures: Map(key -> Float32Array), labels: Map(key -> text), vocabulary,
//  tops: Int32Array of `perNeuron` tokens per neuron}
async function unpackNeurons({ width, layers, measures, listTokens }) {
  const [values, tops, vocabulary] = await Promise.all([
    Promise.all(measures.map(({ key }) => unpackBytes(`measure-${key}`))),
    unpackBytes('tops'),
    unpackJson('vocabulary'),
  ]);
  return {
    width, layers, vocabulary, tops: new Int32Array(tops), perNeuron: listTokens,
    measures: new Map(measures.map(({ key }, i) => [key, new Float32Array(values[i])])),
    labels: new Map(measures.map(({ key, label }) => [key, label])),
  };
}

// Unpacks cards and promoted tokens when they are first needed.
class Cards {
  constructor({ width, chunk }) {
    Object.assign(this, { width, size: chunk, chunks: new Map(), directions: null });
  }

  // A neuron's card, null if there is nothing on it.
  async card(neuron) {
    const [place, index] = [Math.floor(neuron / this.width), neuron % this.width];
    const id = `cards-${place}-${Math.floor(index / this.size)}`;
    if (!this.chunks.has(id)) {
      if (this.chunks.size > 64) this.chunks.clear();
      this.chunks.set(id, unpackJson(id));
    }
    const cards = await this.chunks.get(id);
    if (cards) return cards[index % this.size];
    this.chunks.delete(id);
    throw new Error('the file is still loading, or its end is missing');
  }

  // {promoted, suppressed}, null if the report has none.
  async promoted(neuron) {
    this.directions ??= unpackJson('directions');
    const found = await this.directions;
    const index = neuron % this.width;
    return found && { promoted: found[0][index], suppressed: found[1][index] };
  }
}
