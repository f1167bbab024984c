// Elements, numbers and packed data. Text only ever enters the page through textContent.

function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Four significant digits; no exponent where a reader would not want one.
function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return '–';
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e15) return value.toLocaleString('en');
  if (size >= 1e6 || size < 1e-4) return value.toExponential(2);
  return String(Number(value.toPrecision(size >= 1000 ? 6 : 4)));
}

function withUnit(value, unit) {
  if (!Number.isFinite(value)) return number(value);
  if (unit === 'share') return `${number(100 * value)} %`;
  return unit && unit !== 'share' ? `${number(value)} ${unit}` : number(value);
}

// Line breaks and tabs, which may come as byte pieces, as signs.
function signs(text) {
  return text.replace(/\n|<0x0A>/g, '⏎').replace(/\t|<0x09>/g, '⇥');
}

// A token as it can be read on its own: its leading space and line breaks made visible.
function visible(text) {
  if (text === '') return '∅';
  return signs(text).replace(/^ +| +$/g, (s) => '␣'.repeat(s.length));
}

function empty(text) {
  return el('p', { class: 'empty' }, text);
}

// The bytes of a data element: base64 of gzip.
async function unpackBytes(id) {
  const element = document.getElementById(id);
  if (!element) return null;
  const text = atob(element.textContent);
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) packed[i] = text.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('gzip'));
  return new Response(stream).arrayBuffer();
}

async function unpackText(id) {
  const bytes = await unpackBytes(id);
  return bytes && new TextDecoder().decode(bytes);
}

async function unpackJson(id) {
  const text = await unpackText(id);
  return text === null ? null : JSON.parse(text);
}
