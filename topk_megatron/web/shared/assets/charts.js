// Small charts and tables that need no library.

// rows: [[name, value], …], the largest first
function barChart(rows) {
  return el('ul', { class: 'bars' }, rows.map(([name, value]) => {
    const bar = el('div', { class: 'bar' });
    bar.style.width = `${(100 * value) / rows[0][1]}%`;
    return el('li', {}, el('span', { class: 'name' }, name), el('div', {}, bar),
      el('span', { class: 'number' }, number(value)));
  }));
}

// One or two series of values from 0 to 1, null where there is none; `label` describes the chart.
function lineChart(xs, series, label) {
  const [width, height, left, right, top, foot] = [600, 140, 28, 10, 8, 20];
  const [first, last] = [xs[0], xs[xs.length - 1]];
  const x = (value) => left + ((width - left - right) * (value - first)) / (last - first || 1);
  const y = (value) => top + (height - foot - top) * (1 - value);
  const text = (content, attributes) => svg('text', attributes, content);
  const chart = svg('svg',
    { viewBox: `0 0 ${width} ${height}`, class: 'line', role: 'img', 'aria-label': label },
    svg('line', { class: 'axis', x1: left, x2: width, y1: y(0), y2: y(0) }),
    text('0', { x: 4, y: y(0) + 4 }), text('1', { x: 4, y: y(1) + 6 }),
    text(number(first), { x: left, y: height - 4 }),
    text(number(last), { x: width - right, y: height - 4, 'text-anchor': 'end' }));
  series.forEach((values, index) => {
    const name = index ? 'two' : 'one';
    const points = values.map((value, i) => [x(xs[i]), value === null ? null : y(value)])
      .filter((point) => point[1] !== null);
    const line = points.map((point) => point.join(',')).join(' ');
    chart.append(svg('polyline', { class: name, points: line }));
    points.forEach(([cx, cy]) => chart.append(svg('circle', { class: name, cx, cy, r: 2.5 })));
  });
  return chart;
}

// head: texts; rows: lists of cells. Columns from `numeric` on hold numbers.
function dataTable(head, rows, numeric = Infinity) {
  const kind = (column) => ({ class: column >= numeric ? 'number' : null });
  const cells = (row) => row.map((cell, i) => el('td', kind(i), ...[cell].flat()));
  return el('div', { class: 'scroll' }, el('table', {},
    el('thead', {}, el('tr', {},
      head.map((name, i) => el('th', { scope: 'col', ...kind(i) }, name)))),
    el('tbody', {}, rows.map((row) => el('tr', {}, cells(row))))));
}
