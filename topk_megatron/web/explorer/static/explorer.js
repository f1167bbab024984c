// The page: read a prompt, choose a token and a neuron, push it. The server's sentences are shown as
// they come; everything enters the page as text (dom.js).

const byId = (id) => document.getElementById(id);
const state = { model: null, reading: null, token: 0, chosen: null, unit: 1, asked: 0, generating: false, again: false };

async function ask(path, content) {
  let response;
  try {
    response = await fetch(path, content === undefined ? {} : {
      method: 'POST', headers: { 'Content-Type': 'application/json' }, body: JSON.stringify(content),
    });
  } catch {
    throw new Error('The server does not answer; is topk-explorer still running?');
  }
  const answer = await response.json().catch(() => ({ error: `The server answered with status ${response.status}.` }));
  if (!response.ok) throw new Error(answer.error || `The server answered with status ${response.status}.`);
  return answer;
}

function say(id, error) {
  const text = error ? error.message : '';
  byId(id).textContent = text ? text[0].toUpperCase() + text.slice(1) : '';
}

async function start() {
  const model = await ask('/api/model');
  state.model = model;
  byId('facts').textContent = `${model.name}${model.iteration === null ? '' : `, iteration ${number(model.iteration)}`}: `
    + `TopK at ${model.layers.length} layers, k = ${model.k} of ${number(model.neurons)} neurons; `
    + (model.study ? `cards from ${model.study}` : 'no study given');
  byId('limits').textContent = `Up to ${number(model.max_characters)} characters and ${number(model.max_tokens)} tokens; Ctrl+Enter reads.`;
  byId('goto-layer').append(...model.layers.map((layer) => el('option', { value: layer }, layer)));
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
  const most = values ? Math.max(...values.map(Math.abs)) || 1 : 1;
  const hadFocus = byId('tokens').contains(document.activeElement);
  byId('tokens').replaceChildren(...state.reading.texts.map((text, place) => {
    const value = values?.[place] ?? 0;
    const button = el('button', {
      type: 'button', class: value < 0 ? 'negative' : null, 'aria-pressed': String(place === state.token),
      title: values ? `value ${number(value)}` : `token ${place}`, onclick: () => { state.token = place; showTokens(); showNeurons(); },
    }, visible(text));
    button.style.setProperty('--level', Math.abs(value) / most);
    return button;
  }));
  if (hadFocus) byId('tokens').children[state.token].focus();
  byId('tokens-legend').textContent = values
    ? `Shaded by the value of neuron ${state.chosen.neuron} at layer ${state.chosen.layer}; largest ${number(Math.max(...values.map(Math.abs)))}.` : '';
}

function showNeurons() {
  const at = visible(state.reading.texts[state.token]);
  const layers = Object.entries(state.reading.layers).map(([layer, rows]) => {
    const pairs = rows[state.token];
    const most = Math.max(...pairs.map((pair) => Math.abs(pair[1]))) || 1;
    return el('div', { class: 'layer' }, el('h3', {}, `Layer ${layer}`), el('ul', {}, pairs.map(([neuron, value]) => {
      const button = el('button', {
        type: 'button', class: value < 0 ? 'negative' : null, 'data-layer': layer, 'data-neuron': neuron,
        onclick: () => choose(Number(layer), neuron),
      }, String(neuron), el('small', {}, number(Number(value.toPrecision(3)))));
      button.style.setProperty('--level', Math.abs(value) / most);
      return el('li', {}, button);
    })));
  });
  byId('neurons').replaceChildren(el('p', { class: 'legend' }, 'Strongest at ', el('span', { class: 'mono' }, at), '; small numbers are their values.'), ...layers);
  markChosen();
}

function markChosen() {
  for (const button of byId('neurons').querySelectorAll('button')) {
    const same = state.chosen && Number(button.dataset.layer) === state.chosen.layer && Number(button.dataset.neuron) === state.chosen.neuron;
    button.setAttribute('aria-pressed', String(Boolean(same)));
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
    const changed = state.chosen?.layer !== layer || state.chosen?.neuron !== neuron;
    state.chosen = { layer, neuron, values: found.values };
    state.unit = found.unit;
    byId('goto-layer').value = layer;
    byId('goto-neuron').value = neuron;
    if (changed) { byId('strength').value = 0; byId('continuations').replaceChildren(); say('steer-error', null); }
    showTokens();
    markChosen();
    showCard(layer, neuron, found);
    showSteering(found);
  } catch (error) {
    if (asked === state.asked) say('read-error', error);
  } finally {
    if (asked === state.asked) byId('card').removeAttribute('aria-busy');
  }
}

function showCard(layer, neuron, found) {
  const context = {
    title: `Layer ${layer}, neuron ${neuron}`, text: (token) => found.vocabulary[token] ?? `<${token}>`,
    measures: found.measures, directions: { promoted: found.promoted, suppressed: found.suppressed }, missing: found.missing,
  };
  const parts = found.card !== null ? renderCard(found.card, context) : [
    el('h2', {}, context.title), section('Tokens it promotes and suppresses', renderDirections(null, context)),
    empty(state.model.study ? 'The study did not record this layer.' : 'Examples and measures need a study: start with --study.'),
  ];
  byId('card').replaceChildren(...parts.filter(Boolean));
  byId('card').dataset.neuron = `${layer}:${neuron}`;
}

function showSteering(found) {
  byId('steer-empty').hidden = true;
  byId('steer-form').hidden = false;
  byId('steer-title').textContent = `Steer layer ${state.chosen.layer}, neuron ${state.chosen.neuron}`;
  byId('unit').textContent = `1 is ${number(Number(found.unit.toPrecision(4)))}, ${found.unit_of}.`;
  showStrength();
}

function strength() {
  const value = Number(byId('strength').value);
  return byId('op').value === 'scale' ? value : value * state.unit;
}

function showStrength() {
  const scale = byId('op').value === 'scale';
  byId('unit').hidden = scale;
  const shown = `${Number(byId('strength').value).toFixed(1)}${scale ? '×' : ` (value ${number(Number(strength().toPrecision(3)))})`}`;
  byId('strength-shown').textContent = shown;
  byId('strength').setAttribute('aria-valuetext', shown);
}

// One continuation at a time: a change meanwhile asks for one more when it is done.
async function generate() {
  if (state.generating) { state.again = true; return; }
  if (!state.chosen || !byId('steer-form').reportValidity()) return;
  state.generating = true;
  say('steer-error', null);
  byId('generate').disabled = true;
  byId('continuations').setAttribute('aria-busy', 'true');
  try {
    do {
      state.again = false;
      const { layer, neuron } = state.chosen;
      const { prompt } = state.reading;
      const answer = await ask('/api/steer', {
        prompt, layer, neuron, op: byId('op').value, value: strength(), new_tokens: Number(byId('new-tokens').value),
        temperature: Number(byId('temperature').value), seed: Number(byId('seed').value),
      });
      if (state.chosen.layer === layer && state.chosen.neuron === neuron) showContinuations(prompt, answer);
    } while (state.again);
  } catch (error) {
    say('steer-error', error);
  } finally {
    state.generating = false;
    byId('generate').disabled = false;
    byId('continuations').removeAttribute('aria-busy');
  }
}

function showContinuations(prompt, { unsteered, steered }) {
  let same = 0;
  while (same < steered.tokens.length && steered.tokens[same] === unsteered.tokens[same]) same += 1;
  const equal = same === steered.tokens.length && same === unsteered.tokens.length;
  const tail = prompt.length > 60 ? `…${prompt.slice(-60)}` : prompt;
  const column = (title, text) => el('div', {}, el('h4', {}, title), el('p', {}, el('span', { class: 'given' }, tail), text.replace(/\n+$/, (breaks) => '⏎'.repeat(breaks.length))));
  byId('continuations').replaceChildren(column('Unsteered', unsteered.text), column('Steered', steered.text),
    el('p', { class: 'legend' }, equal ? 'Both are the same.' : `They part after ${same} token${same === 1 ? '' : 's'}.`));
}

byId('prompt-form').addEventListener('submit', (event) => { event.preventDefault(); read(); });
byId('prompt').addEventListener('keydown', (event) => {
  if (event.key === 'Enter' && (event.ctrlKey || event.metaKey)) { event.preventDefault(); read(); }
});
byId('goto').addEventListener('submit', (event) => {
  event.preventDefault();
  choose(Number(byId('goto-layer').value), Number(byId('goto-neuron').value));
});
byId('steer-form').addEventListener('submit', (event) => { event.preventDefault(); generate(); });
byId('strength').addEventListener('input', showStrength);
byId('strength').addEventListener('change', generate);
byId('op').addEventListener('change', () => { byId('strength').value = byId('op').value === 'scale' ? 1 : 0; showStrength(); });
start().catch((error) => say('read-error', error));
