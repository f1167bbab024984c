// Elements and forms. Text only ever enters the page through textContent.

const byId = (id) => document.getElementById(id);

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

// A part of the page that has nothing to show says why.
function empty(text) {
  return el('p', { class: 'empty' }, text);
}

function legend(...content) {
  return el('p', { class: 'legend' }, ...content);
}

function section(title, content) {
  return el('section', {}, el('h3', {}, title), ...[content].flat());
}

// pairs: [[value, label], …]
function options(pairs) {
  return pairs.map(([value, label]) => el('option', { value }, label));
}

function onSubmit(id, act) {
  byId(id).addEventListener('submit', (event) => { event.preventDefault(); act(); });
}

// Colours an element by a value: .shaded in card.css reads --level and `negative`.
function shade(element, value, largest) {
  element.classList.add('shaded');
  element.classList.toggle('negative', value < 0);
  element.style.setProperty('--level', Math.min(1, Math.abs(value) / (largest || 1)));
  return element;
}

function largestOf(values) {
  return Math.max(...values.map(Math.abs));
}
