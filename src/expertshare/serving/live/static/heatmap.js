// Layers by experts: lit in this step, used in earlier steps (the more often the stronger), not used yet.

const LABEL = 26;
const COUNT = 30;
const SEEN_FROM = 0.14; // how much of the accent an expert keeps that was used once, and one that always was
const SEEN_TO = 0.5;

export class HeatMap {
  #canvas;
  #layers = 0;
  #experts = 0;
  #lit = [];
  #uses = [];
  #steps = 0;

  constructor(canvas) {
    this.#canvas = canvas;
    new ResizeObserver(() => this.draw()).observe(canvas);
    document.addEventListener("themechange", () => this.draw());
  }

  reset(layers, experts) {
    this.#layers = layers;
    this.#experts = experts;
    this.#steps = 0;
    this.#lit = Array.from({ length: layers }, () => new Set());
    this.#uses = Array.from({ length: layers }, () => new Uint32Array(experts));
    this.#canvas.style.height = `${this.#rowHeight * layers}px`;
    this.draw();
  }

  light(idsByLayer) {
    this.#lit = idsByLayer.map((ids) => new Set(ids));
    this.draw();
    this.#steps += 1;
    idsByLayer.forEach((ids, layer) => ids.forEach((expert) => (this.#uses[layer][expert] += 1)));
  }

  get #rowHeight() {
    return Math.min(24, Math.max(6, Math.floor(190 / Math.max(1, this.#layers))));
  }

  draw() {
    const box = this.#canvas.getBoundingClientRect();
    if (this.#layers === 0 || box.width === 0) return;
    const scale = window.devicePixelRatio || 1;
    this.#canvas.width = Math.round(box.width * scale);
    this.#canvas.height = Math.round(this.#rowHeight * this.#layers * scale);
    const context = this.#canvas.getContext("2d");
    const style = getComputedStyle(this.#canvas);
    const colours = {
      accent: style.getPropertyValue("--accent").trim(),
      off: style.getPropertyValue("--off").trim(),
      text: style.getPropertyValue("--soft").trim(),
      font: `${Math.round(11 * scale)}px ${style.fontFamily}`,
    };
    const row = this.#rowHeight * scale;
    const room = this.#canvas.width - (LABEL + COUNT) * scale;
    const every = Math.max(1, Math.ceil((13 * scale) / row));
    for (let layer = 0; layer < this.#layers; layer += 1) {
      this.#cells(context, layer, { left: LABEL * scale, top: layer * row, width: room, height: row, scale, colours });
      if (layer % every === 0) this.#labels(context, layer, layer * row + row / 2, scale, colours);
    }
  }

  #cells(context, layer, { left, top, width, height, scale, colours }) {
    const step = width / this.#experts;
    const gap = step >= 4 * scale ? Math.max(1, Math.round(scale)) : 0;
    const rowGap = height >= 8 * scale ? Math.max(1, Math.round(1.5 * scale)) : gap;
    for (let expert = 0; expert < this.#experts; expert += 1) {
      // edges are rounded, widths are what lies between them: no blur, no stripes
      const from = Math.round(left + expert * step);
      const to = Math.round(left + (expert + 1) * step) - gap;
      const y = Math.round(top);
      const size = [from, y, Math.max(1, to - from), Math.max(1, Math.round(top + height) - rowGap - y)];
      context.globalAlpha = 1;
      context.fillStyle = colours.off;
      context.fillRect(...size);
      const uses = this.#uses[layer][expert];
      const lit = this.#lit[layer].has(expert);
      if (!lit && uses === 0) continue;
      context.fillStyle = colours.accent;
      context.globalAlpha = lit ? 1 : SEEN_FROM + (SEEN_TO - SEEN_FROM) * (uses / this.#steps);
      context.fillRect(...size);
    }
    context.globalAlpha = 1;
  }

  #labels(context, layer, middle, scale, colours) {
    context.fillStyle = colours.text;
    context.font = colours.font;
    context.textBaseline = "middle";
    context.textAlign = "left";
    context.fillText(`${layer + 1}`, 2 * scale, middle);
    context.textAlign = "right";
    const lit = this.#lit[layer].size;
    context.fillText(lit > 0 ? `${lit}` : "", this.#canvas.width - 2 * scale, middle);
  }
}
