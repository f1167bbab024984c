// Reads a prompt, and shows the chosen token's neurons and the chosen neuron's card.

const state = { model: null, reading: null, token: 0, chosen: null, asked: 0 };

async function start() {
  const model = await ask('/api/model');
  state.model = model;
  byId('facts').textContent = `${modelName(model)}: `
    + `TopK at ${count(model.layers.length, 'layer')}, k = ${model.k} of ${number(model.neurons)} neurons; `
    + (model.study ? `cards from ${model.study}` : 'no study given');
  byId('limits').textContent = `Up to ${number(model.max_characters)} characters and `
    + `${number(model.max_tokens)} tokens. Ctrl+Enter also reads.`;
  byId('goto-layer').append(...options(model.layers.map((layer) => [layer, layer])));
  byId('goto-neuron').max = model.neurons - 1;
  byId('new-tokens').max = model.max_new_tokens;
  byId('new-tokens').value = Math.min(24, model.max_new_tokens);
  document.documentElement.dataset.ready = 'yes';
}

async function read() {
  say('read-error', null);
  byId('read').disabled = true;
  try {
    const prompt = byId('prompt').value;
    const reading = await ask('/api/read', { prompt });
    state.reading = { ...reading, prompt };
    state.token = reading.tokens.length - 1;
    showTokens();
    showNeurons();
    if (state.chosen) await choose(state.chosen.layer, state.chosen.neuron);
  } catch (error) {
    say('read-error', error);
  } finally {
    byId('read').disabled = false;
  }
}

function showTokens() {
  const values = state.chosen?.values;
  const largest = values ? largestOf(values) : 1;
  const hadFocus = byId('tokens').contains(document.activeElement);
  byId('tokens').replaceChildren(...state.reading.texts.map((text, place) => {
    const value = values?.[place] ?? 0;
    return shade(el('button', {
      type: 'button', 'aria-pressed': String(place === state.token),
      title: values ? `value ${number(value)}` : `token ${place}`,
      onclick: () => { state.token = place; showTokens(); showNeurons(); },
    }, visible(text)), value, largest);
  }));
  if (hadFocus) byId('tokens').children[state.token].focus();
  byId('tokens-legend').textContent = values
    ? `Shaded by the value of neuron ${state.chosen.neuron} at layer ${state.chosen.layer}; `
      + `the largest is ${number(largest)}.` : '';
}

function showNeurons() {
  const token = el('span', { class: 'mono' }, visible(state.reading.texts[state.token]));
  const layers = Object.entries(state.reading.layers)
    .map(([layer, rows]) => layerRow(Number(layer), rows[state.token]));
  byId('neurons').replaceChildren(
    legend('The strongest neurons at ', token, '; small numbers are their values.'), ...layers);
  markChosen();
}

function layerRow(layer, pairs) {
  const largest = largestOf(pairs.map((pair) => pair[1]));
  const buttons = pairs.map(([neuron, value]) => shade(el('button', {
    type: 'button', 'data-layer': layer, 'data-neuron': neuron,
    onclick: () => choose(layer, neuron),
  }, String(neuron), el('small', {}, rounded(value, 3))), value, largest));
  return el('div', { class: 'layer' }, el('h3', {}, `Layer ${layer}`),
    el('ul', {}, buttons.map((button) => el('li', {}, button))));
}

function isChosen(layer, neuron) {
  return state.chosen?.layer === layer && state.chosen?.neuron === neuron;
}

function markChosen() {
  for (const button of byId('neurons').querySelectorAll('button')) {
    const { layer, neuron } = button.dataset;
    button.setAttribute('aria-pressed', String(isChosen(Number(layer), Number(neuron))));
  }
}

async function choose(layer, neuron) {
  if (!state.reading) { say('read-error', new Error('Read a prompt first.')); return; }
  say('read-error', null);
  const asked = (state.asked += 1);
  byId('card').setAttribute('aria-busy', 'true');
  try {
    const found = await ask('/api/neuron', { prompt: state.reading.prompt, layer, neuron });
    if (asked !== state.asked) return;
    const changed = !isChosen(layer, neuron);
    state.chosen = { layer, neuron, values: found.values };
    byId('goto-layer').value = layer;
    byId('goto-neuron').value = neuron;
    showTokens();
    markChosen();
    showCard(found);
    showSteering(state.chosen, found, changed);
  } catch (error) {
    if (asked === state.asked) say('read-error', error);
  } finally {
    if (asked === state.asked) byId('card').removeAttribute('aria-busy');
  }
}

function showCard({ card, vocabulary, measures, promoted, suppressed, missing }) {
  const { layer, neuron } = state.chosen;
  const context = {
    title: neuronName(layer, neuron), text: tokenText(vocabulary),
    measures, directions: { promoted, suppressed }, missing,
  };
  const parts = card !== null ? renderCard(card, context) : [
    el('h2', {}, context.title),
    section('Tokens it promotes and suppresses', renderDirections(null, context)),
    empty(state.model.study ? 'The study did not record this layer.'
      : 'Examples and measures need a study; start the explorer with --study.'),
  ];
  byId('card').replaceChildren(...parts);
  byId('card').dataset.neuron = `${layer}:${neuron}`;
}

onSubmit('prompt-form', read);
byId('prompt').addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) { event.preventDefault(); read(); }
});
onSubmit('goto', () => choose(Number(byId('goto-layer').value), Number(byId('goto-neuron').value)));
start().catch((error) => say('read-error', error));
