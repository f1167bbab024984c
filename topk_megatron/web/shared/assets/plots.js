// Interactive plots, drawn by Plotly, which is unpacked after the first view.

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

function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  const dark = matchMedia('(prefers-color-scheme: dark)').matches;
  return {
    fg: of('--fg'), line: of('--line'),
    series: dark ? ['#7db8f0', '#ff963c', '#6fce96', '#d79bf0', '#f0d264', '#f08a8a']
      : ['#0b5cad', '#c75400', '#14693a', '#7b2fa0', '#8a6d00', '#a32020'],
  };
}

function layout(xTitle, yTitle, more = {}) {
  const { fg, line, series } = colours();
  const axis = (text) => ({ title: { text }, gridcolor: line, zerolinecolor: line, automargin: true });
  return {
    paper_bgcolor: 'rgba(0,0,0,0)', plot_bgcolor: 'rgba(0,0,0,0)', font: { color: fg, size: 13 },
    margin: { l: 50, r: 10, t: 10, b: 45 }, colorway: series, hovermode: 'closest',
    legend: { orientation: 'h', y: 1.02, yanchor: 'bottom' },
    xaxis: { ...axis(xTitle), ...more.xaxis }, yaxis: { ...axis(yTitle), ...more.yaxis },
  };
}

// Rows of a table of columns that hold `wanted` in the given columns.
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

// A line with its 95 % intervals as bars.
function line(name, rows, x, more = {}) {
  const y = rows.map((row) => row.mean);
  const bars = rows.every((row) => row.low !== null && row.high !== null) ? {
    type: 'data', symmetric: false, thickness: 1, width: 3,
    array: rows.map((row) => row.high - row.mean), arrayminus: rows.map((row) => row.mean - row.low),
  } : undefined;
  return { name, x: rows.map(x), y, error_y: bars, mode: 'lines+markers', ...more };
}

// A figure whose plot depends on a choice: draw(choice) -> {data, layout, click}.
function figure(title, caption, choices, draw) {
  const place = el('div', { class: 'plot', role: 'img', 'aria-label': `${title}. ${caption}` });
  const select = el('select', {}, choices.map(([value, label]) => el('option', { value }, label)));
  const update = async () => {
    const Plotly = await loadPlotly();
    const { data, layout: drawn, click } = draw(select.value);
    await Plotly.react(place, data, drawn, { responsive: true, displaylogo: false });
    place.removeAllListeners?.('plotly_click');
    if (click) place.on('plotly_click', (event) => click(event.points[0]));
  };
  select.addEventListener('change', update);
  const controls = choices.length > 1 ? el('label', { class: 'plot-controls' }, 'Show ', select) : null;
  return { element: el('figure', {}, el('figcaption', {}, el('strong', {}, title), el('span', { class: 'muted' }, caption), controls), place), update };
}

function entropyFigure(table) {
  const measures = different(table.measure);
  const runs = different(table.run);
  return figure('Entropy by layer, compared', 'Mean over neurons with its 95 % interval by bootstrap over neurons; lower is more specialised.',
    measures.map((m) => [m, m.replaceAll('_', ' ')]), (measure) => ({
      data: runs.map((run) => {
        const all = rowsWhere(table, { run, measure, resampled: 'neurons' });
        const rows = all.filter((row) => row.layer !== ALL_LAYERS);
        return line(run, rows, (row) => row.layer, run.endsWith(':shuffled') ? { line: { dash: 'dot' } } : {});
      }).filter((one) => one.x.length),
      layout: layout('layer', 'bits', { xaxis: { dtick: table.layer.some((n) => n > 12) ? undefined : 1 }, yaxis: { rangemode: 'tozero' } }),
    }));
}

function trackFigure(table) {
  const pick = (name, label) => line(label, rowsWhere(table, { measure: name, layer: ALL_LAYERS }), (row) => row.iteration);
  const views = {
    similarity: ['similarity to the final neuron', [['similarity', 'the same neuron'], ['other_similarity', 'another neuron (control)'], ['example_overlap', 'overlap of examples'], ['context_similarity', 'contexts']], ''],
    specialised: ['share that is specialised, or finds itself', [['specialised', 'specialised'], ['same_index', 'nearest is itself']], 'share'],
    token_entropy: ['token entropy', [['token_entropy', 'mean of all neurons']], 'bits'],
  };
  return figure('Across training', 'Mean over neurons with its 95 % interval, by iteration.',
    Object.entries(views).map(([key, [label]]) => [key, label]), (view) => ({
      data: views[view][1].map(([name, label]) => pick(name, label)).filter((one) => one.x.length),
      layout: layout('iteration', views[view][2], { yaxis: { rangemode: 'tozero' } }),
    }));
}

function steerFigure(table) {
  return figure('Steering', 'Mean over steered neurons with its 95 % interval, by strength; the control pushes a random neuron that is as active.',
    different(table.measure).map((m) => [m, m.replaceAll('_', ' ')]), (measure) => ({
      data: [false, true].map((control) => line(control ? 'control' : 'the neuron itself',
        rowsWhere(table, { layer: ALL_LAYERS, measure, control }).sort((a, b) => a.strength - b.strength), (row) => row.strength,
        control ? { line: { dash: 'dot' } } : {})).filter((one) => one.x.length),
      layout: layout('strength (multiples of its largest value)', measure === 'damage' ? 'bits' : 'share'),
    }));
}

function saeFigure(table) {
  return figure('Do neurons match?', 'Share of SAE latents that match between seeds, against TopK neurons that match between checkpoints.',
    different(table.measure).map((m) => [m, m.replaceAll('_', ' ')]), (measure) => ({
      data: different(table.comparison).map((comparison) => {
        const rows = rowsWhere(table, { comparison, measure }).sort((a, b) => a.layer - b.layer);
        return line(comparison.replaceAll('_', ' '), rows, (row) => `${row.layer === ALL_LAYERS ? 'all layers' : `layer ${row.layer}`}, ${row.a} – ${row.b}`, { mode: 'markers', marker: { size: 9 } });
      }),
      layout: layout('', 'share', { yaxis: { rangemode: 'tozero' } }),
    }));
}

// Neurons as points; a click opens the card. At most `limit` are drawn, evenly spaced.
function neuronFigure(data, nameOf, open, limit = 4000) {
  const keys = [...data.measures.keys()];
  const wanted = keys.includes('token_entropy') ? 'token_entropy' : 'max';
  const label = (key) => data.labels.get(key);
  const choices = [wanted, ...keys.filter((key) => key !== wanted && key !== 'count')].map((key) => [key, label(key)]);
  const total = data.layers.length * data.width;
  const drawn = total > limit ? ` ${number(limit)} of ${number(total)} are drawn, evenly spaced; a click opens the card.` : ' A click opens the card.';
  return figure('Neurons', `Each point a neuron, by how often it fires.${drawn}`, choices, (key) => {
    const [values, counts] = [data.measures.get(key), data.measures.get('count')];
    const step = Math.max(1, total / limit);
    const data_ = data.layers.map((layer, place) => ({ name: `layer ${layer}`, x: [], y: [], text: [], customdata: [], mode: 'markers', type: 'scatter', marker: { size: 5, opacity: 0.6 }, place }));
    for (let at = 0; at < total; at += step) {
      const neuron = Math.floor(at);
      const trace = data_[Math.floor(neuron / data.width)];
      if (counts[neuron] > 0 && !Number.isNaN(values[neuron])) {
        trace.x.push(counts[neuron]); trace.y.push(values[neuron]); trace.customdata.push(neuron); trace.text.push(nameOf(neuron));
      }
    }
    return { data: data_.map(({ place, ...trace }) => ({ ...trace, hovertemplate: '%{text}<br>%{x} activations, %{y}<extra></extra>' })),
      layout: layout('activations', label(key), { xaxis: { type: 'log' } }), click: (point) => open(point.customdata) };
  });
}
