// The claims of a study as a table, and what the study lacks.

const VERDICTS = {
  true: ['yes', 'holds'], false: ['no', 'does not hold'], null: ['open', 'open'],
};

function renderClaims({ claims, missing }) {
  // Every card says for itself why promoted tokens are missing.
  const reasons = Object.entries(missing).filter(([part]) => part !== 'promoted')
    .map(([, reason]) => empty(reason));
  if (!claims.length) return [empty('No claim was measured in this study.'), ...reasons];
  return [
    dataTable(['Claim', 'Numbers', 'Difference', 'Outcome'], claims.map(renderClaim)),
    el('p', { class: 'muted' }, 'Brackets hold 95 % intervals. '
      + '“Open” means that the interval of the difference contains 0.'),
    ...reasons,
  ];
}

function renderClaim({ claim, measure, unit, note, rows, difference, holds }) {
  const [name, verdict] = VERDICTS[String(holds)];
  const details = [measure, unit].filter(Boolean).join(', ') + (note ? `; ${note}` : '');
  return [
    [claim, el('div', { class: 'muted' }, details)],
    el('div', { class: 'claim-rows' }, rows.flatMap((row) => [
      el('span', { class: 'muted' }, row.name),
      el('span', { title: `n = ${number(row.n)}` }, ...interval(row, unit)),
    ])),
    difference
      ? [el('div', { class: 'muted' }, difference.name), ...interval(difference, unit)] : '–',
    el('span', { class: `verdict ${name}` }, verdict),
  ];
}

function interval({ value, low, high }, unit) {
  if (value === null) return ['not measured'];
  const known = low !== null && low !== undefined;
  const range = known ? ` [${number(low)}, ${number(high)}]` : null;
  return [withUnit(value, unit === 'bits' ? 'bits' : ''),
    range && el('span', { class: 'interval' }, range)];
}
