// Steers the chosen neuron, and shows the continuation next to the unsteered one.

const steering = { unit: 1, running: false, again: false };

// Shows the form for the chosen neuron; `changed` says that it was another one before.
function showSteering({ layer, neuron }, { unit, unit_of: unitOf }, changed) {
  steering.unit = unit;
  if (changed) {
    byId('strength').value = 0;
    byId('continuations').replaceChildren();
    say('steer-error', null);
  }
  byId('steer-empty').hidden = true;
  byId('steer-form').hidden = false;
  byId('steer-title').textContent = `Steer layer ${layer}, neuron ${neuron}`;
  byId('unit').textContent = `Strength 1 is ${rounded(unit, 4)}, ${unitOf}.`;
  showStrength();
}

function scales() {
  return byId('op').value === 'scale';
}

function strength() {
  return Number(byId('strength').value) * (scales() ? 1 : steering.unit);
}

function showStrength() {
  byId('unit').hidden = scales();
  const factor = Number(byId('strength').value).toFixed(1);
  const shown = scales() ? `${factor}×` : `${factor} (value ${rounded(strength(), 3)})`;
  byId('strength-shown').textContent = shown;
  byId('strength').setAttribute('aria-valuetext', shown);
}

// Only one continuation runs at a time: a change in the meantime asks for another one after it.
async function generate() {
  if (steering.running) { steering.again = true; return; }
  if (!state.chosen || !byId('steer-form').reportValidity()) return;
  steering.running = true;
  say('steer-error', null);
  byId('generate').disabled = true;
  byId('continuations').setAttribute('aria-busy', 'true');
  try {
    do {
      steering.again = false;
      const { layer, neuron } = state.chosen;
      const { prompt } = state.reading;
      const answer = await ask('/api/steer', { prompt, layer, neuron, ...steeringSettings() });
      const { chosen } = state;
      if (chosen.layer === layer && chosen.neuron === neuron) showContinuations(prompt, answer);
    } while (steering.again);
  } catch (error) {
    say('steer-error', error);
  } finally {
    steering.running = false;
    byId('generate').disabled = false;
    byId('continuations').removeAttribute('aria-busy');
  }
}

function steeringSettings() {
  const [tokens, temperature, seed] = ['new-tokens', 'temperature', 'seed']
    .map((id) => Number(byId(id).value));
  return { op: byId('op').value, value: strength(), new_tokens: tokens, temperature, seed };
}

function showContinuations(prompt, { unsteered, steered }) {
  let same = 0;
  while (same < steered.tokens.length && steered.tokens[same] === unsteered.tokens[same]) same += 1;
  const equal = same === steered.tokens.length && same === unsteered.tokens.length;
  const tail = prompt.length > 60 ? `…${prompt.slice(-60)}` : prompt;
  const column = (title, text) => pairPart(title, el('span', { class: 'given' }, tail),
    text.replace(/\n+$/, (breaks) => '⏎'.repeat(breaks.length)));
  byId('continuations').replaceChildren(
    column('Unsteered', unsteered.text), column('Steered', steered.text),
    legend(equal ? 'Both are the same.' : `They differ after ${count(same, 'token')}.`));
}

onSubmit('steer-form', generate);
byId('strength').addEventListener('input', showStrength);
byId('strength').addEventListener('change', generate);
byId('op').addEventListener('change', () => {
  byId('strength').value = scales() ? 1 : 0;
  showStrength();
});
