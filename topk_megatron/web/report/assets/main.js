// Puts the page together from its data elements.

const byId = (id) => document.getElementById(id);
const state = { data: null, summary: null, chunks: new Map(), directions: undefined, opened: null };

async function start() {
  const summary = await unpackJson('summary');
  state.summary = summary;
  showFacts(summary);
  byId('claims-body').append(...renderClaims(summary));
  const [measures, tops, vocabulary] = await Promise.all([
    Promise.all(summary.measures.map(async ({ key }) => [key, new Float32Array(await unpackBytes(`measure-${key}`))])),
    unpackBytes('tops').then((bytes) => new Int32Array(bytes)),
    unpackJson('vocabulary'),
  ]);
  state.data = {
    width: summary.width, layers: summary.layers, measures: new Map(measures), tops, vocabulary,
    perNeuron: summary.listTokens, labels: new Map(summary.measures.map((one) => [one.key, one.label])),
  };
  const list = new NeuronList(byId('list'), describeNeuron, (neuron) => openNeuron(neuron, true));
  fillControls(list);
  // After the next frame, so that the mark says when a reader sees it.
  await new Promise((done) => { requestAnimationFrame(() => setTimeout(done)); });
  performance.mark('first-view');
  document.documentElement.dataset.ready = 'list';
  if (document.readyState === 'loading') await new Promise((done) => { document.addEventListener('DOMContentLoaded', done, { once: true }); });
  followHash(list);
  await new Promise((done) => { (window.requestIdleCallback || setTimeout)(done); });
  await drawPlots();
  performance.mark('plots');
  document.documentElement.dataset.ready = 'all';
}

function showFacts({ kind, layers, width, k, model, corpus, run }) {
  const kinds = { topk: 'TopK LM', dense: 'dense LM, its k largest neurons', sae: 'dense LM with a SAE' };
  byId('facts').textContent = `${kinds[kind] || kind} ${model.path}${model.iteration === null ? '' : `, iteration ${number(model.iteration)}`}: `
    + `${layers.length} layers of ${number(width)} ${kind === 'sae' ? 'latents' : 'neurons'}, k = ${k}, on ${number(corpus.tokens)} tokens of ${corpus.path}`;
  byId('origin').textContent = `Run ${run}. Model ${model.fingerprint.slice(0, 12)}, corpus ${corpus.fingerprint.slice(0, 12)}. Made by topk-megatron; formulas in docs/analysis.md.`;
}

function interval(row, unit) {
  if (row.value === null) return ['not measured'];
  const range = row.low === null || row.low === undefined ? null : el('span', { class: 'interval' }, ` [${number(row.low)}, ${number(row.high)}]`);
  return [withUnit(row.value, unit === 'bits' ? 'bits' : ''), range];
}

function renderClaims({ claims, missing }) {
  const reasons = Object.entries(missing).filter(([part]) => part !== 'promoted').map(([, reason]) => empty(reason));
  if (!claims.length) return [empty('No claim was measured in this study.'), ...reasons];
  const verdicts = { true: ['yes', 'holds'], false: ['no', 'does not hold'], null: ['open', 'open'] };
  const rows = claims.map((claim) => {
    const [name, verdict] = verdicts[String(claim.holds)];
    return el('tr', {},
      el('td', {}, claim.claim, el('div', { class: 'muted' }, `${claim.measure}${claim.unit ? `, ${claim.unit}` : ''}${claim.note ? `; ${claim.note}` : ''}`)),
      el('td', {}, el('div', { class: 'claim-rows' }, claim.rows.flatMap((row) => [el('span', { class: 'muted' }, row.name),
        el('span', { title: `n = ${number(row.n)}` }, ...interval(row, claim.unit))]))),
      el('td', {}, ...(claim.difference ? [el('div', { class: 'muted' }, claim.difference.name), ...interval(claim.difference, claim.unit)] : ['–'])),
      el('td', {}, el('span', { class: `verdict ${name}` }, verdict)));
  });
  return [el('div', { class: 'scroll' }, el('table', {},
    el('thead', {}, el('tr', {}, ['Claim', 'Numbers', 'Difference', 'Outcome'].map((name) => el('th', { scope: 'col' }, name)))),
    el('tbody', {}, rows))),
  el('p', { class: 'muted' }, 'Brackets are 95 % intervals. Open: the interval of the difference contains 0.'), ...reasons];
}

function nameOf(neuron) {
  const { layers, width } = state.data;
  return `Layer ${layers[Math.floor(neuron / width)]}, neuron ${neuron % width}`;
}

function describeNeuron(neuron) {
  const { data, summary } = state;
  const key = byId('sort').value;
  const measure = summary.measures.find((one) => one.key === key);
  const tops = Array.from(data.tops.subarray(neuron * data.perNeuron, (neuron + 1) * data.perNeuron));
  const tokens = tops.filter((token) => token >= 0).map((token) => visible(data.vocabulary[token] ?? `<${token}>`));
  return { name: nameOf(neuron), value: measure ? withUnit(data.measures.get(key)[neuron], measure.unit) : '', tokens: tokens.join('  ') || 'never fired' };
}

function fillControls(list) {
  const { summary, data } = state;
  byId('layer').append(el('option', { value: '' }, 'all'), ...summary.layers.map((layer, place) => el('option', { value: place }, layer)));
  byId('sort').append(...summary.measures.map((one) => el('option', { value: one.key }, one.label)), el('option', { value: '' }, 'Number'));
  byId('measure-help').append(...summary.measures.flatMap((one) => [el('dt', {}, one.key), el('dd', {}, `${one.label}: ${one.hint}${one.unit ? ` (${one.unit})` : ''}`)]));
  const update = () => {
    const place = byId('layer').value;
    const found = findNeurons(byId('search').value, place === '' ? null : Number(place), byId('sort').value, byId('order').value === 'down', data);
    byId('count').textContent = found.error || `${number(found.order.length)} of ${number(data.layers.length * data.width)} neurons`;
    byId('count').classList.toggle('error', Boolean(found.error));
    if (!found.error) list.show(found.order);
  };
  for (const id of ['layer', 'sort', 'order']) byId(id).addEventListener('change', update);
  let timer = 0;
  byId('search').addEventListener('input', () => { clearTimeout(timer); timer = setTimeout(update, 120); });
  byId('controls').addEventListener('submit', (event) => { event.preventDefault(); update(); });
  update();
}

function followHash() {
  const open = () => {
    const found = /^#L(\d+)N(\d+)$/.exec(location.hash);
    if (!found) return;
    const place = state.data.layers.indexOf(Number(found[1]));
    if (place < 0 || Number(found[2]) >= state.data.width) byId('card').replaceChildren(el('p', { class: 'error' }, `There is no neuron ${found[2]} of layer ${found[1]} in this report.`));
    else if (state.opened !== place * state.data.width + Number(found[2])) openNeuron(place * state.data.width + Number(found[2]), true);
  };
  window.addEventListener('hashchange', open);
  open();
}

async function cardOf(neuron) {
  const { width, chunk } = { width: state.data.width, chunk: state.summary.chunk };
  const [place, index] = [Math.floor(neuron / width), neuron % width];
  const id = `cards-${place}-${Math.floor(index / chunk)}`;
  if (!state.chunks.has(id)) {
    if (state.chunks.size > 64) state.chunks.clear();
    state.chunks.set(id, unpackJson(id));
  }
  const cards = await state.chunks.get(id);
  if (!cards) { state.chunks.delete(id); throw new Error('the file is still being read, or its end is missing'); }
  return cards[index % chunk];
}

async function openNeuron(neuron, reveal) {
  const began = performance.now();
  const { data, summary } = state;
  state.opened = neuron;
  const target = byId('card');
  try {
    if (state.directions === undefined) state.directions = await unpackJson('directions');
    const card = await cardOf(neuron);
    if (state.opened !== neuron) return;
    const directions = state.directions && { promoted: state.directions[0][neuron % data.width], suppressed: state.directions[1][neuron % data.width] };
    target.replaceChildren(el('a', { class: 'back', href: '#neurons' }, 'Back to the list'), ...renderCard(card, {
      title: nameOf(neuron), text: (token) => data.vocabulary[token] ?? `<${token}>`, directions, missing: summary.missing,
      measures: summary.measures.map((one) => ({ ...one, value: data.measures.get(one.key)[neuron] })),
    }));
  } catch (error) {
    target.replaceChildren(el('p', { class: 'error' }, `This card cannot be shown: ${error.message}.`));
  }
  const layer = data.layers[Math.floor(neuron / data.width)];
  history.replaceState(null, '', `#L${layer}N${neuron % data.width}`);
  if (reveal && matchMedia('(max-width: 820px)').matches) target.scrollIntoView();
  target.getBoundingClientRect(); // lays the card out: that is part of its time
  performance.measure('card', { start: began, end: performance.now() });
  target.dataset.neuron = neuron;
}

async function drawPlots() {
  const { tables, missing } = state.summary;
  const open = (neuron) => { openNeuron(neuron, true); byId('card').scrollIntoView(); };
  const figures = [neuronFigure(state.data, nameOf, open)];
  const draw = { entropy: entropyFigure, track: trackFigure, steer: steerFigure, sae: saeFigure };
  for (const [name, make] of Object.entries(draw)) {
    if (tables[name] && Object.values(tables[name])[0]?.length) figures.push(make(tables[name]));
    else byId('plots-body').append(empty(missing[name] || `The table of ${name} is empty.`));
  }
  byId('plots-body').prepend(...figures.map((one) => one.element));
  for (const one of figures) await one.update();
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => figures.forEach((one) => one.update()));
}

start().catch((error) => {
  byId('claims-body').replaceChildren(el('p', { class: 'error' }, `This report cannot be shown: ${error.message}. It needs a browser with DecompressionStream (2023 or later).`));
});
