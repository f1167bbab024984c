// A neuron's card, whose parts topk_megatron/web/shared/cards.py describes.
//
// `context` holds what the card itself does not:
//   title       its heading
//   text        text(token) is a token's text
//   measures    [{label, value, unit, hint}, …]
//   directions  {promoted, suppressed}, or null
//   missing     {part: the reason why the study lacks it}

function renderCard(card, context) {
  const known = card || {};
  return [
    el('h2', {}, context.title),
    renderMeasures(context.measures),
    section('Strongest examples', renderExamples(known.examples, context)),
    el('div', { class: 'columns' },
      section('Tokens it fires on', renderHistogram(known, context)),
      section('Concept tokens', renderConcept(known.concept, context))),
    section('Tokens it promotes and suppresses', renderDirections(known.measured, context)),
    section('Across training', renderTrack(known.track, context)),
    section('Steering', renderSteering(known, context)),
  ].filter(Boolean);
}

function renderMeasures(measures) {
  if (!measures.length) return null;
  return el('dl', { class: 'numbers' }, measures.map(({ label, value, unit, hint }) => el('div',
    { title: hint || null }, el('dt', {}, label), el('dd', {}, withUnit(value, unit)))));
}

function renderExamples(examples, context) {
  if (!examples) return empty(context.missing.examples || 'It never fired on this corpus.');
  const largest = largestOf(examples.map((one) => one[0]));
  return el('ol', { class: 'examples' }, examples.map((example) => {
    const [value, place, position, target, tokens, fired] = example;
    const levels = new Map(fired);
    const parts = tokens.map((token, i) => exampleToken(
      signs(context.text(token)), levels.get(i), largest, i === target));
    const where = [['value', value], ['document', place], ['position', position]]
      .map(([name, shown]) => `${name} ${number(shown)}`).join(' · ');
    return el('li', {}, el('div', { class: 'text', dir: 'auto' }, parts),
      el('div', { class: 'where' }, where));
  }));
}

function exampleToken(text, value, largest, isTarget) {
  if (value === undefined && !isTarget) return text;
  const title = `value ${number(value || 0)}`;
  const element = el(isTarget ? 'mark' : 'span', { class: 'fired', title }, text);
  return shade(element, value || 0, largest);
}

function renderHistogram(card, context) {
  if (!card.tokens) return empty(context.missing.tokens || 'It never fired on this corpus.');
  const rest = card.distinct - card.tokens.length;
  return [
    barChart(card.tokens.map(([token, count]) => [visible(context.text(token)), count])),
    rest > 0 ? legend(`and ${count(rest, 'more token')}`) : null,
  ];
}

function renderConcept(concept, context) {
  if (!concept) return empty(context.missing.entropy || 'No token stands out.');
  return [
    chips(concept, context, (lift) => `×${number(lift)}`),
    legend('How many times as often as in the whole corpus.'),
  ];
}

function chips(pairs, context, note) {
  return el('ul', { class: 'chips' }, pairs.map(([token, value]) => el('li', { class: 'chip' },
    visible(context.text(token)), el('small', {}, note(value)))));
}

function renderDirections(measured, context) {
  const side = (label, pairs) => el('div', {}, legend(label),
    pairs && pairs.length ? chips(pairs, context, signed) : empty('None.'));
  const both = (labels, { promoted, suppressed }) => el('div', { class: 'columns' },
    side(labels[0], promoted), side(labels[1], suppressed));
  const parts = context.directions ? [
    both(['Promoted', 'Suppressed'], context.directions),
    legend('Relative effect on the logits through the final norm and the output layer; '
      + 'it is the same at every layer.'),
  ] : [empty(context.missing.promoted || 'Not computed.')];
  if (measured) {
    parts.push(both(['Promoted when steered', 'Suppressed when steered'], measured),
      legend('Mean change of the logit at strength 1, including the effect of later layers.'));
  }
  return parts;
}

function renderTrack(track, context) {
  if (!track) return empty(context.missing.track || 'This neuron was not tracked.');
  const [iterations, entropies, similarities] = [0, 2, 3].map((i) => track.map((row) => row[i]));
  const similarity = el('span', { class: 'one' }, '— similarity to the final checkpoint');
  const known = entropies.filter((value) => value !== null);
  if (!known.length) {
    return [lineChart(iterations, [similarities], 'Similarity by iteration'), legend(similarity)];
  }
  const largest = Math.max(...known);
  const scaled = entropies.map((value) => (value === null ? null : value / (largest || 1)));
  const entropy = largest > 0 ? ` (1 = ${withUnit(largest, 'bits')})` : '';
  return [
    lineChart(iterations, [similarities, scaled], 'Similarity and token entropy by iteration'),
    legend(similarity, '  ', el('span', { class: 'two' }, `- - token entropy${entropy}`)),
  ];
}

function renderSteering(card, context) {
  if (!card.steer) return empty(context.missing.steer || 'This neuron was not steered.');
  const rows = [...card.steer].sort((a, b) => a[1] - b[1] || a[0] - b[0]);
  const table = dataTable(['Steered', 'Strength', 'Success', 'Damage', 'Repetition'],
    rows.map(([strength, control, success, damage, repetition]) => [
      control ? 'control' : 'this neuron', number(strength),
      withUnit(success, 'share'), withUnit(damage, 'bits'), withUnit(repetition, 'share'),
    ]), 1);
  const samples = (card.samples || []).map(renderSample);
  if (samples.length) samples[samples.length - 1].open = true;
  return [table, ...(samples.length ? samples : [empty('No samples were kept.')])];
}

function renderSample([strength, prompt, unsteered, steered]) {
  return el('details', {},
    el('summary', {}, `Sample at strength ${number(strength)}`),
    legend('Prompt: ', el('span', { class: 'mono' }, prompt)),
    el('div', { class: 'pair' }, pairPart('Unsteered', unsteered), pairPart('Steered', steered)));
}

// One of two texts that are compared.
function pairPart(title, ...content) {
  return el('div', {}, el('h4', {}, title), el('p', {}, ...content));
}
