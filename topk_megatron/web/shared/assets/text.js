// How numbers, tokens and names are written.

// Four significant digits, with an exponent only where a reader would want one.
function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return '–';
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e15) return value.toLocaleString('en');
  if (size >= 1e6 || size < 1e-4) return value.toExponential(2);
  return String(Number(value.toPrecision(size >= 1000 ? 6 : 4)));
}

// A value with its unit; a missing value has none.
function withUnit(value, unit) {
  if (!Number.isFinite(value) || !unit) return number(value);
  if (unit === 'share') return `${number(100 * value)} %`;
  if (unit === 'iteration') return `iteration ${number(value)}`;
  if (unit === 'bits') return count(value, 'bit');
  return `${number(value)} ${unit}`;
}

function count(size, noun) {
  return `${number(size)} ${noun}${size === 1 ? '' : 's'}`;
}

function signed(value) {
  return `${value > 0 ? '+' : ''}${number(value)}`;
}

function rounded(value, digits) {
  return number(Number(value.toPrecision(digits)));
}

function neuronName(layer, neuron) {
  return `Layer ${layer}, neuron ${neuron}`;
}

function modelName({ name, iteration }) {
  return iteration === null ? name : `${name}, iteration ${number(iteration)}`;
}

// The text of a token; `vocabulary` is a list or an object of texts by token.
function tokenText(vocabulary) {
  return (token) => vocabulary[token] ?? `<${token}>`;
}

// Line breaks and tabs, which may come as byte tokens, as visible signs.
function signs(text) {
  return text.replace(/\n|<0x0A>/g, '⏎').replace(/\t|<0x09>/g, '⇥');
}

// A token on its own: its outer spaces, line breaks and tabs are made visible.
function visible(text) {
  if (text === '') return '∅';
  return signs(text).replace(/^ +| +$/g, (spaces) => '␣'.repeat(spaces.length));
}
