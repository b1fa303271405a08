// Shows events at a pace that eyes can follow. The server sends as fast as it decodes; its figures stay its own.

export class Playback {
  #queue = [];
  #timer = 0;
  #last = 0;

  constructor(show) {
    this.show = show;
    this.pace = 0;
  }

  get idle() {
    return this.#queue.length === 0 && this.#timer === 0;
  }

  add(frame) {
    this.#queue.push(frame);
    if (this.#timer === 0) this.#wait();
  }

  // Everything that is left, at once.
  flush() {
    const left = this.#queue;
    this.clear();
    left.forEach((frame) => this.show(frame));
  }

  clear() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.#queue = [];
  }

  #wait() {
    const due = Math.max(0, this.#last + this.pace - performance.now());
    this.#timer = setTimeout(() => this.#play(), due);
  }

  #play() {
    this.#timer = 0;
    const frame = this.#queue.shift();
    if (frame.takesTime) this.#last = performance.now();
    if (this.#queue.length > 0) this.#wait();
    this.show(frame);
  }
}
