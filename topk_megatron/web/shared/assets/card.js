// A neuron's card. `context` tells what a card cannot know:
//   text(token), title, measures [{label, value, unit, hint}],
//   directions {promoted, suppressed} or null, missing {part: reason}.

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
    section('Steered', renderSteering(known, context)),
  ];
}

function section(title, content) {
  return el('section', {}, el('h3', {}, title), ...[content].flat());
}

function renderMeasures(measures) {
  if (!measures.length) return null;
  return el('dl', { class: 'numbers' }, measures.map((one) => el('div', { title: one.hint || null },
    el('dt', {}, one.label), el('dd', {}, withUnit(one.value, one.unit)))));
}

function renderExamples(examples, context) {
  if (!examples) return empty(context.missing.examples || 'It never fired on this corpus.');
  const most = Math.max(...examples.map((one) => Math.abs(one[0]))) || 1;
  return el('ol', { class: 'examples' }, examples.map(([value, document_, position, target, tokens, fired]) => {
    const levels = new Map(fired);
    const text = el('div', { class: 'text', dir: 'auto' });
    tokens.forEach((token, i) => text.append(exampleToken(context.text(token), levels.get(i), most, i === target)));
    return el('li', {}, text, el('div', { class: 'where' },
      `value ${number(value)} · document ${number(document_)} · position ${number(position)}`));
  }));
}

function exampleToken(text, level, most, isTarget) {
  const shown = signs(text);
  if (level === undefined && !isTarget) return document.createTextNode(shown);
  const classes = `fired${level < 0 ? ' negative' : ''}`;
  const element = el(isTarget ? 'mark' : 'span', { class: classes, title: `value ${number(level || 0)}` }, shown);
  element.style.setProperty('--level', Math.min(1, Math.abs(level || 0) / most));
  return element;
}

function renderHistogram(card, context) {
  if (!card.tokens) return empty(context.missing.tokens || 'It never fired on this corpus.');
  const most = card.tokens[0][1];
  const rest = card.distinct - card.tokens.length;
  return [
    el('ul', { class: 'bars' }, card.tokens.map(([token, count]) => {
      const bar = el('div', { class: 'bar' });
      bar.style.width = `${(100 * count) / most}%`;
      return el('li', {}, el('span', { class: 'name' }, visible(context.text(token))), el('div', {}, bar),
        el('span', { class: 'number' }, number(count)));
    })),
    rest > 0 ? el('p', { class: 'legend' }, `and ${number(rest)} more tokens`) : null,
  ];
}

function chips(pairs, context, note) {
  return el('ul', { class: 'chips' }, pairs.map(([token, value]) => el('li', { class: 'chip' },
    visible(context.text(token)), el('small', {}, note(value)))));
}

function renderConcept(concept, context) {
  if (!concept) return empty(context.missing.entropy || 'No token stands out.');
  return [chips(concept, context, (lift) => `×${number(lift)}`),
    el('p', { class: 'legend' }, 'How many times more often than in the corpus.')];
}

function signed(value) {
  return `${value > 0 ? '+' : ''}${number(value)}`;
}

function renderDirections(measured, context) {
  const side = (name, label, pairs) => el('div', {}, el('p', { class: 'legend' }, label),
    pairs && pairs.length ? chips(pairs, context, signed) : empty('None.'));
  const parts = [];
  if (context.directions) {
    parts.push(el('div', { class: 'columns' },
      side('promoted', 'Promoted', context.directions.promoted),
      side('suppressed', 'Suppressed', context.directions.suppressed)),
    el('p', { class: 'legend' }, 'Through final norm and output layer, in proportion; the same for every layer.'));
  } else parts.push(empty(context.missing.promoted || 'Not computed.'));
  if (measured) {
    parts.push(el('div', { class: 'columns' },
      side('promoted', 'Measured when steered: promoted', measured.promoted),
      side('suppressed', 'Suppressed', measured.suppressed)),
    el('p', { class: 'legend' }, 'Mean change of the logit at strength 1, later layers included.'));
  }
  return parts;
}

function renderTrack(track, context) {
  if (!track) return empty(context.missing.track || 'This neuron was not followed.');
  const iterations = track.map((row) => row[0]);
  const entropies = track.map((row) => row[2]);
  const most = Math.max(1e-9, ...entropies.filter((v) => v !== null));
  const scaled = entropies.map((v) => (v === null ? null : v / most));
  return [
    lineChart(iterations, [track.map((row) => row[3]), scaled], ['0', '1'], 'Similarity and token entropy by iteration'),
    el('p', { class: 'legend' }, el('span', { class: 'one' }, '— similarity to the end'), '  ',
      el('span', { class: 'two' }, `- - token entropy (1 = ${number(most)} bits)`)),
  ];
}

function lineChart(xs, series, [bottom, top], label) {
  const [width, height, left, foot] = [600, 140, 28, 20];
  const first = xs[0];
  const span = xs[xs.length - 1] - first || 1;
  const x = (value) => left + ((width - left - 10) * (value - first)) / span;
  const y = (value) => 8 + (height - foot - 8) * (1 - value);
  const chart = svg('svg', { viewBox: `0 0 ${width} ${height}`, class: 'line', role: 'img', 'aria-label': label },
    svg('line', { class: 'axis', x1: left, x2: width, y1: y(0), y2: y(0) }),
    svg('text', { x: 4, y: y(0) + 4 }, bottom), svg('text', { x: 4, y: y(1) + 6 }, top),
    svg('text', { x: left, y: height - 4 }, number(first)),
    svg('text', { x: width - 10, y: height - 4, 'text-anchor': 'end' }, number(xs[xs.length - 1])));
  series.forEach((values, index) => {
    const name = index ? 'two' : 'one';
    const points = values.map((value, i) => [x(xs[i]), value === null ? null : y(value)]).filter((p) => p[1] !== null);
    chart.append(svg('polyline', { class: name, points: points.map((p) => p.join(',')).join(' ') }));
    points.forEach(([cx, cy]) => chart.append(svg('circle', { class: name, cx, cy, r: 2.5 })));
  });
  return chart;
}

function renderSteering(card, context) {
  if (!card.steer) return empty(context.missing.steer || 'This neuron is not among those that were steered.');
  const rows = [...card.steer].sort((a, b) => a[1] - b[1] || a[0] - b[0]);
  const table = el('table', {},
    el('thead', {}, el('tr', {}, ['Pushed', 'Strength', 'Success', 'Damage', 'Repetition'].map((name, i) => el('th', { class: i ? 'number' : null }, name)))),
    el('tbody', {}, rows.map(([strength, control, success, damage, repetition]) => el('tr', {},
      el('td', {}, control ? 'control' : 'it'),
      ...[number(strength), withUnit(success, 'share'), withUnit(damage, 'bits'), withUnit(repetition, 'share')].map((text) => el('td', { class: 'number' }, text))))));
  const samples = (card.samples || []).map(([strength, prompt, unsteered, steered]) => el('details', {},
    el('summary', {}, `Sample at strength ${number(strength)}`),
    el('p', { class: 'legend' }, 'Prompt: ', el('span', { class: 'mono' }, prompt)),
    el('div', { class: 'pair' },
      el('div', {}, el('h4', {}, 'Unsteered'), el('p', {}, unsteered)),
      el('div', {}, el('h4', {}, 'Steered'), el('p', {}, steered)))));
  if (samples.length) samples[samples.length - 1].open = true;
  return [el('div', { class: 'scroll' }, table), ...(samples.length ? samples : [empty('No samples were kept.')])];
}
