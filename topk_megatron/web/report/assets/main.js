// Puts the report together from its data elements.

const KINDS = {
  topk: 'TopK LM', dense: 'Dense LM, its k largest neurons', sae: 'Dense LM with an SAE',
};
const state = { neurons: null, summary: null, cards: null, opened: null };

async function start() {
  const summary = await unpackJson('summary');
  Object.assign(state, { summary, cards: new Cards(summary) });
  showFacts(summary);
  byId('claims-body').append(...renderClaims(summary));
  state.neurons = await unpackNeurons(summary);
  fillControls(new NeuronList(byId('list'), describeNeuron, (neuron) => openNeuron(neuron, true)));
  // After the next frame, so that the mark is the time at which a reader sees it.
  await new Promise((done) => { requestAnimationFrame(() => setTimeout(done)); });
  performance.mark('first-view');
  document.documentElement.dataset.ready = 'list';
  if (document.readyState === 'loading') {
    await new Promise((done) => {
      document.addEventListener('DOMContentLoaded', done, { once: true });
    });
  }
  window.addEventListener('hashchange', followHash);
  followHash();
  await new Promise((done) => { (window.requestIdleCallback || setTimeout)(done); });
  await drawPlots();
  performance.mark('plots');
  document.documentElement.dataset.ready = 'all';
}

function failure(text) {
  return el('p', { class: 'error' }, text);
}

function showFacts({ kind, layers, width, k, model, corpus, run }) {
  const name = modelName({ name: model.path, iteration: model.iteration });
  byId('facts').textContent = `${KINDS[kind] || kind} ${name}: `
    + `${count(layers.length, 'layer')} of ${count(width, kind === 'sae' ? 'latent' : 'neuron')}, `
    + `k = ${k}, on ${number(corpus.tokens)} tokens of ${corpus.path}`;
  byId('origin').textContent = `Run ${run}. Model ${model.fingerprint.slice(0, 12)}, `
    + `corpus ${corpus.fingerprint.slice(0, 12)}. `
    + 'Written by topk-megatron; docs/analysis.md explains the formulas.';
}

function nameOf(neuron) {
  const { layers, width } = state.neurons;
  return neuronName(layers[Math.floor(neuron / width)], neuron % width);
}

// A neuron's row in the list.
function describeNeuron(neuron) {
  const { measures, tops, perNeuron, vocabulary } = state.neurons;
  const key = byId('sort').value;
  const measure = state.summary.measures.find((one) => one.key === key);
  const tokens = Array.from(tops.subarray(neuron * perNeuron, (neuron + 1) * perNeuron))
    .filter((token) => token >= 0).map(tokenText(vocabulary)).map(visible);
  return {
    name: nameOf(neuron),
    value: measure ? withUnit(measures.get(key)[neuron], measure.unit) : '',
    tokens: tokens.join('  ') || 'never fired',
  };
}

function fillControls(list) {
  const { measures, layers } = state.summary;
  byId('layer').append(...options([['', 'all'], ...layers.map((layer, place) => [place, layer])]));
  byId('sort').append(...options(measures.map(({ key, label }) => [key, label])),
    ...options([['', 'Number']]));
  byId('measure-help').append(...measures.flatMap(({ key, label, hint, unit }) => [
    el('dt', {}, key), el('dd', {}, `${label}: ${hint}${unit ? ` (${unit})` : ''}`)]));
  const update = () => updateList(list);
  for (const id of ['layer', 'sort', 'order']) byId(id).addEventListener('change', update);
  let timer = 0;
  byId('search').addEventListener('input', () => {
    clearTimeout(timer);
    timer = setTimeout(update, 120);
  });
  onSubmit('controls', update);
  update();
}

function updateList(list) {
  const { neurons } = state;
  const valueOf = (id) => byId(id).value;
  const place = valueOf('layer') === '' ? null : Number(valueOf('layer'));
  const descending = valueOf('order') === 'down';
  const found = findNeurons(valueOf('search'), place, valueOf('sort'), descending, neurons);
  byId('count').classList.toggle('error', Boolean(found.error));
  byId('count').textContent = found.error
    || `${number(found.order.length)} of ${number(neurons.layers.length * neurons.width)} neurons`;
  if (!found.error) list.show(found.order);
}

// Opens the neuron that the address names: #L3N17.
function followHash() {
  const found = /^#L(\d+)N(\d+)$/.exec(location.hash);
  if (!found) return;
  const [layer, index] = found.slice(1).map(Number);
  const { layers, width } = state.neurons;
  const place = layers.indexOf(layer);
  if (place < 0 || index >= width) {
    byId('card').replaceChildren(
      failure(`There is no neuron ${index} at layer ${layer} in this report.`));
  } else if (state.opened !== place * width + index) openNeuron(place * width + index, true);
}

async function openNeuron(neuron, reveal) {
  const began = performance.now();
  const { neurons, cards } = state;
  state.opened = neuron;
  const target = byId('card');
  try {
    const [directions, card] = await Promise.all([cards.promoted(neuron), cards.card(neuron)]);
    if (state.opened !== neuron) return;
    const back = el('a', { class: 'back', href: '#neurons' }, 'Back to the list');
    target.replaceChildren(back, ...renderCard(card, contextOf(neuron, directions)));
  } catch (error) {
    target.replaceChildren(failure(`This card cannot be shown: ${error.message}.`));
  }
  const layer = neurons.layers[Math.floor(neuron / neurons.width)];
  history.replaceState(null, '', `#L${layer}N${neuron % neurons.width}`);
  if (reveal && matchMedia('(max-width: 820px)').matches) target.scrollIntoView();
  target.getBoundingClientRect(); // Lays the card out, which is part of the time it takes.
  performance.measure('card', { start: began, end: performance.now() });
  target.dataset.neuron = neuron;
}

function contextOf(neuron, directions) {
  const { neurons, summary } = state;
  return {
    title: nameOf(neuron), text: tokenText(neurons.vocabulary), directions,
    missing: summary.missing,
    measures: summary.measures.map(
      (one) => ({ ...one, value: neurons.measures.get(one.key)[neuron] })),
  };
}

async function drawPlots() {
  const { tables, missing } = state.summary;
  const open = (neuron) => { openNeuron(neuron, true); byId('card').scrollIntoView(); };
  const figures = [neuronFigure(state.neurons, nameOf, open)];
  const draw = { entropy: entropyFigure, track: trackFigure, steer: steerFigure, sae: saeFigure };
  for (const [name, make] of Object.entries(draw)) {
    if (tables[name] && Object.values(tables[name])[0]?.length) figures.push(make(tables[name]));
    else byId('plots-body').append(empty(missing[name] || `The table of ${name} is empty.`));
  }
  byId('plots-body').prepend(...figures.map((one) => one.element));
  for (const one of figures) await one.update();
  matchMedia('(prefers-color-scheme: dark)')
    .addEventListener('change', () => figures.forEach((one) => one.update()));
}

start().catch((error) => {
  byId('claims-body').replaceChildren(failure(`This report cannot be shown: ${error.message}. `
    + 'It needs a browser with DecompressionStream (2023 or later).'));
});
