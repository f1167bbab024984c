// Interactive plots, drawn by Plotly, which is unpacked after the first view.

// A report stays on the reader's machine: no button may offer to upload a chart.
const PLOTLY_CONFIG = {
  responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: '',
};
// The `layer` of rows about all layers together, as topk_megatron/analysis/tables.py writes it.
const ALL_LAYERS = -1;
let plotly = null;

function loadPlotly() {
  plotly ??= unpackText('plotly').then((source) => {
    const script = document.createElement('script');
    script.textContent = source;
    document.head.append(script);
    return window.Plotly;
  });
  return plotly;
}

// The colours of base.css, which depend on the theme.
function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  return { fg: of('--fg'), line: of('--line'), series: of('--series').split(/\s*,\s*/) };
}

function layout(xTitle, yTitle, { xaxis, yaxis } = {}) {
  const { fg, line: grid, series } = colours();
  const axis = (text) => (
    { title: { text }, gridcolor: grid, zerolinecolor: grid, automargin: true });
  return {
    paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', font: { color: fg, size: 13 },
    margin: { l: 50, r: 10, t: 10, b: 45 }, colorway: series, hovermode: 'closest',
    legend: { orientation: 'h', y: 1.02, yanchor: 'bottom' },
    xaxis: { ...axis(xTitle), ...xaxis }, yaxis: { ...axis(yTitle), ...yaxis },
  };
}

// A table comes as {column: values}; returns its rows that hold the wanted values.
function rowsWhere(table, wanted) {
  const names = Object.keys(table);
  const found = [];
  for (let i = 0; i < table[names[0]].length; i += 1) {
    if (Object.entries(wanted).every(([name, value]) => table[name]?.[i] === value)) {
      found.push(Object.fromEntries(names.map((name) => [name, table[name][i]])));
    }
  }
  return found;
}

function different(values) { return [...new Set(values)]; }

function spaced(name) { return name.replaceAll('_', ' '); }

function choicesOf(names) { return different(names).map((name) => [name, spaced(name)]); }

function withPoints(lines) { return lines.filter((one) => one.x.length); }

// A line through means, with their 95 % intervals as bars.
function line(name, rows, x, more = {}) {
  const y = rows.map((row) => row.mean);
  const bars = rows.every((row) => row.low !== null && row.high !== null) ? {
    type: 'data', symmetric: false, thickness: 1, width: 3,
    array: rows.map((row) => row.high - row.mean),
    arrayminus: rows.map((row) => row.mean - row.low),
  } : undefined;
  return { name, x: rows.map(x), y, error_y: bars, mode: 'lines+markers', ...more };
}

// A figure whose plot depends on a choice: draw(choice) returns {data, layout, click}.
function figure(title, caption, choices, draw) {
  const label = `${title}. ${caption}`;
  const place = el('div', { class: 'plot', role: 'img', 'aria-label': label });
  const select = el('select', {}, options(choices));
  const update = async () => {
    const Plotly = await loadPlotly();
    const { data, layout: drawn, click } = draw(select.value);
    await Plotly.react(place, data, drawn, PLOTLY_CONFIG);
    place.removeAllListeners?.('plotly_click');
    if (click) place.on('plotly_click', (event) => click(event.points[0]));
  };
  select.addEventListener('change', update);
  const controls = choices.length > 1
    ? el('label', { class: 'plot-controls' }, 'Show ', select) : null;
  const text = el('figcaption', {},
    el('strong', {}, title), el('span', { class: 'muted' }, caption), controls);
  return { element: el('figure', {}, text, place), update };
}

function entropyFigure(table) {
  const caption = 'Mean over neurons with its 95 % interval from a bootstrap over neurons; '
    + 'lower is more specialised.';
  const dotted = (run) => (run.endsWith(':shuffled') ? { line: { dash: 'dot' } } : {});
  return figure('Entropy by layer, compared', caption, choicesOf(table.measure), (measure) => ({
    data: withPoints(different(table.run).map((run) => {
      const rows = rowsWhere(table, { run, measure, resampled: 'neurons' });
      return line(run, rows.filter((row) => row.layer >= 0), (row) => row.layer, dotted(run));
    })),
    layout: layout('layer', 'bits', {
      xaxis: { dtick: table.layer.some((layer) => layer > 12) ? undefined : 1 },
      yaxis: { rangemode: 'tozero' },
    }),
  }));
}

// For each choice its label, its lines [measure, label], and the unit.
const TRACK_VIEWS = {
  similarity: ['similarity to the final neuron', [
    ['similarity', 'the same neuron'], ['other_similarity', 'another neuron (control)'],
    ['example_overlap', 'overlap of examples'], ['context_similarity', 'contexts'],
  ], ''],
  specialised: ['share that is specialised, or nearest to itself', [
    ['specialised', 'specialised'], ['same_index', 'nearest to itself'],
  ], 'share'],
  token_entropy: ['token entropy', [['token_entropy', 'mean of all neurons']], 'bits'],
};

function trackFigure(table) {
  const caption = 'Mean over neurons with its 95 % interval, by iteration.';
  const choices = Object.entries(TRACK_VIEWS).map(([key, [label]]) => [key, label]);
  return figure('Across training', caption, choices, (view) => {
    const [, lines, unit] = TRACK_VIEWS[view];
    return {
      data: withPoints(lines.map(([measure, label]) => line(
        label, rowsWhere(table, { measure, layer: -1 }), (row) => row.iteration))),
      layout: layout('iteration', unit, { yaxis: { rangemode: 'tozero' } }),
    };
  });
}

function steerFigure(table) {
  const caption = 'Mean over steered neurons with its 95 % interval, by strength; '
    + 'the control steers a random neuron that is as active.';
  const lineOf = (measure, control) => {
    const rows = rowsWhere(table, { layer: ALL_LAYERS, measure, control });
    rows.sort((a, b) => a.strength - b.strength);
    return line(control ? 'control' : 'the neuron itself', rows, (row) => row.strength,
      control ? { line: { dash: 'dot' } } : {});
  };
  const axis = "strength (multiples of the neuron's largest value)";
  return figure('Steering', caption, choicesOf(table.measure), (measure) => ({
    data: withPoints([false, true].map((control) => lineOf(measure, control))),
    layout: layout(axis, measure === 'damage' ? 'bits' : 'share'),
  }));
}

function saeFigure(table) {
  const caption = 'Share of SAE latents that match between seeds, compared with the share of TopK '
    + 'neurons that match between checkpoints.';
  const name = ({ layer, a, b }) => `${layer < 0 ? 'all layers' : `layer ${layer}`}, ${a} – ${b}`;
  return figure('Do neurons match?', caption, choicesOf(table.measure), (measure) => ({
    data: different(table.comparison).map((comparison) => {
      const rows = rowsWhere(table, { comparison, measure }).sort((a, b) => a.layer - b.layer);
      return line(spaced(comparison), rows, name, { mode: 'markers', marker: { size: 9 } });
    }),
    layout: layout('', 'share', { yaxis: { rangemode: 'tozero' } }),
  }));
}

// Neurons as points; a click opens the card. At most `limit` are drawn, evenly spaced.
function neuronFigure(data, nameOf, open, limit = 4000) {
  const keys = [...data.measures.keys()];
  const wanted = keys.includes('token_entropy') ? 'token_entropy' : 'max';
  const others = keys.filter((key) => key !== wanted && key !== 'count');
  const choices = [wanted, ...others].map((key) => [key, data.labels.get(key)]);
  const total = data.layers.length * data.width;
  const drawn = total > limit
    ? ` ${number(limit)} of ${number(total)} are drawn, evenly spaced.` : '';
  const caption = `Each point is a neuron, placed by how often it fires.${drawn} `
    + 'A click opens its card.';
  return figure('Neurons', caption, choices, (key) => ({
    data: neuronPoints(data, key, nameOf, Math.max(1, total / limit)),
    layout: layout('activations', data.labels.get(key), { xaxis: { type: 'log' } }),
    click: (point) => open(point.customdata),
  }));
}

function neuronPoints(data, key, nameOf, step) {
  const [values, counts] = [data.measures.get(key), data.measures.get('count')];
  const traces = data.layers.map((layer) => ({
    name: `layer ${layer}`, x: [], y: [], text: [], customdata: [],
    mode: 'markers', type: 'scatter', marker: { size: 5, opacity: 0.6 },
    hovertemplate: '%{text}<br>%{x} activations, %{y}<extra></extra>',
  }));
  for (let at = 0; at < data.layers.length * data.width; at += step) {
    const neuron = Math.floor(at);
    const trace = traces[Math.floor(neuron / data.width)];
    if (counts[neuron] > 0 && !Number.isNaN(values[neuron])) {
      trace.x.push(counts[neuron]);
      trace.y.push(values[neuron]);
      trace.customdata.push(neuron);
      trace.text.push(nameOf(neuron));
    }
  }
  return traces;
}
