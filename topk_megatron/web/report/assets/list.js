// A list in which only the visible rows exist. Keyboard and pointer choose one.

const ROW_HEIGHT = 52;

class NeuronList {
  // describe(neuron) -> {name, value, tokens}; choose(neuron) opens its card.
  constructor(element, describe, choose) {
    Object.assign(this, { element, describe, choose, order: new Uint32Array(0), active: -1 });
    this.filler = el('div', { role: 'presentation' });
    this.rows = new Map();
    element.append(this.filler);
    element.addEventListener('scroll', () => this.schedule(), { passive: true });
    element.addEventListener('keydown', (event) => this.key(event));
    element.addEventListener('click', (event) => {
      const row = event.target.closest('.row');
      if (row) this.open(Number(row.dataset.place));
    });
    new ResizeObserver(() => this.schedule()).observe(element);
  }

  show(order) {
    const chosen = this.order[this.active];
    this.order = order;
    this.active = chosen === undefined ? -1 : order.indexOf(chosen);
    this.filler.style.height = `${order.length * ROW_HEIGHT}px`;
    this.element.scrollTop = 0;
    this.clear();
    this.draw();
  }

  clear() {
    for (const row of this.rows.values()) row.remove();
    this.rows.clear();
  }

  schedule() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => { this.waiting = false; this.draw(); });
  }

  draw() {
    const top = this.element.scrollTop;
    const first = Math.max(0, Math.floor(top / ROW_HEIGHT) - 4);
    const bottom = Math.ceil((top + this.element.clientHeight) / ROW_HEIGHT);
    const last = Math.min(this.order.length, bottom + 4);
    for (const [place, row] of this.rows) {
      if (place < first || place >= last) { row.remove(); this.rows.delete(place); }
    }
    for (let place = first; place < last; place += 1) {
      if (!this.rows.has(place)) this.rows.set(place, this.makeRow(place));
    }
    this.mark();
  }

  makeRow(place) {
    const { name, value, tokens } = this.describe(this.order[place]);
    const row = el('div', {
      class: 'row', role: 'option', id: `row-${place}`, 'data-place': place,
      'aria-setsize': this.order.length, 'aria-posinset': place + 1,
    }, el('span', { class: 'name' }, name), el('span', { class: 'value' }, value),
    el('span', { class: 'tokens' }, tokens));
    row.style.top = `${place * ROW_HEIGHT}px`;
    this.element.append(row);
    return row;
  }

  mark() {
    const name = 'aria-activedescendant';
    for (const [place, row] of this.rows) row.setAttribute('aria-selected', place === this.active);
    if (this.rows.has(this.active)) this.element.setAttribute(name, `row-${this.active}`);
    else this.element.removeAttribute(name);
  }

  move(place) {
    if (!this.order.length) return;
    this.active = Math.max(0, Math.min(this.order.length - 1, place));
    const top = this.active * ROW_HEIGHT;
    const view = this.element;
    const lowest = top + ROW_HEIGHT - view.clientHeight;
    if (top < view.scrollTop) view.scrollTop = top;
    else if (lowest > view.scrollTop) view.scrollTop = lowest;
    this.draw();
  }

  open(place) {
    this.move(place);
    this.choose(this.order[place]);
  }

  key(event) {
    const page = Math.max(1, Math.floor(this.element.clientHeight / ROW_HEIGHT) - 1);
    const steps = {
      ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity,
    };
    if (event.key in steps) {
      event.preventDefault();
      this.move(this.active + steps[event.key]);
    } else if ((event.key === 'Enter' || event.key === ' ') && this.active >= 0) {
      event.preventDefault();
      this.open(this.active);
    }
  }
}
