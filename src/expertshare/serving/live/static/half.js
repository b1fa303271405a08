// One side of the page: a policy, its counters, its block, its experts, its answer.

import { NONE, bytes, plural, three } from "./format.js";
import { HeatMap } from "./heatmap.js";

const LEVELS = [0.3, 0.5, 0.7, 0.9, 0.99]; // as the legend says
const END = "end";

export function level(confidence) {
  return LEVELS.filter((least) => confidence >= least).length;
}

export class Half {
  #root;
  #cells = [];
  #map;
  #model = null;
  #policy = "";

  constructor(template, side) {
    this.#root = template.content.firstElementChild.cloneNode(true);
    this.#root.classList.add(side);
    this.#root.id = `half-${side}`;
    const heading = this.#find(".policy");
    heading.id = `policy-name-${side}`;
    this.#root.setAttribute("aria-labelledby", heading.id);
    this.#map = new HeatMap(this.#find(".heat"));
  }

  get element() {
    return this.#root;
  }

  // Before a run: everything is in its place already, so that nothing moves later.
  reset(policy, model, state = "ready") {
    this.#policy = policy;
    this.#model = model;
    this.#find(".policy").textContent = policy;
    this.#find(".answer").setAttribute("aria-label", `Answer under ${policy}`);
    this.#find(".experts").textContent = "";
    for (const name of ["unique", "bytes", "speed", "steps"]) this.#count(name, NONE);
    this.#count("unique-of", `of ${model.num_experts} a layer`);
    this.#count("tokens-of", "0 tokens");
    this.#count("block-of", NONE);
    this.#layOut(model.block_length);
    this.#map.reset(model.num_moe_layers, model.num_experts);
    this.#find(".heat").setAttribute("aria-label", "Experts by layer: none used yet");
    this.#write("");
    this.state(state);
  }

  state(text, done = false) {
    this.#find(".state").textContent = text;
    this.#root.classList.toggle("done", done);
  }

  // A block before its first step: the prompt's end, if it begins in this block, and masks.
  open(event) {
    event.tokens.forEach((token, place) => {
      if (token.role === "prompt") this.#show(this.#cell(place), token);
      else this.#mask(this.#cell(place));
    });
    this.#title(event, event.tokens.filter((token) => token.role !== "prompt").length);
    this.state(`block ${event.block + 1}`);
  }

  step(event) {
    event.tokens.forEach((token, place) => {
      if (token.masked) this.#mask(this.#cell(place));
      else this.#show(this.#cell(place), token);
    });
    this.#title(event, event.tokens.filter((token) => token.masked).length);
    this.#map.light(event.experts);
    this.#describe(event);
    this.#count("unique", three(event.unique_experts));
    this.#count("bytes", bytes(event.expert_bytes_so_far));
    this.#count("speed", three(event.tokens_so_far / event.elapsed_s));
    this.#count("tokens-of", plural(event.tokens_so_far, "token"));
    this.#count("steps", `${event.steps}`);
    this.#count("block-of", `${event.step + 1} in block ${event.block + 1}`);
  }

  block(event) {
    this.#write(event.answer, event.finish_reason !== null);
    if (event.finish_reason !== null) {
      this.state(event.finish_reason === "eos" ? "finished" : "finished at its length", true);
    }
  }

  totals(run) {
    this.#count("speed", three(run.tokens_per_s));
    this.#count("tokens-of", plural(run.tokens, "token"));
    this.#count("bytes", bytes(run.expert_bytes));
    this.#count("steps", `${run.steps}`);
    this.#count("block-of", `in ${plural(run.blocks, "block")}`);
    this.#count("unique", three(run.unique_experts));
    this.#count("unique-of", `of ${this.#model.num_experts}, mean`);
  }

  #find(selector) {
    return this.#root.querySelector(selector);
  }

  #count(name, text) {
    this.#find(`[data-counter="${name}"]`).textContent = text;
  }

  #layOut(length) {
    const block = this.#find(".block");
    this.#cells = Array.from({ length }, () => document.createElement("div"));
    this.#cells.forEach((cell) => this.#mask(cell));
    block.replaceChildren(...this.#cells);
    block.setAttribute("aria-label", "No block yet");
    this.#find(".decided").textContent = `${length} tokens`;
  }

  #cell(place) {
    return this.#cells[place];
  }

  #mask(cell) {
    if (cell.className === "cell masked") return;
    cell.className = "cell masked";
    cell.textContent = "";
    cell.title = "masked";
  }

  #show(cell, token) {
    const text = visible(token);
    const kind = token.role === "prompt" ? "prompt" : `c${level(token.confidence)}`;
    const name = `cell ${kind}${token.role === END ? " end" : ""}`;
    const fresh = cell.classList.contains("masked") && token.role !== "prompt";
    if (cell.textContent === text && cell.className.startsWith(name)) return;
    cell.className = fresh ? `${name} fresh` : name;
    cell.textContent = text;
    const sure = token.confidence === null ? "prompt" : `confidence ${token.confidence.toFixed(3)}`;
    cell.title = `${JSON.stringify(token.text)}, ${sure}`;
  }

  #title(event, masked) {
    const total = event.tokens.length;
    this.#find(".decided").textContent = masked === 0 ? `all ${total} decided` : `${masked} of ${total} masked`;
    const words = event.tokens.map((token) => (token.masked ? "…" : token.text)).join("");
    this.#find(".block").setAttribute(
      "aria-label",
      `${this.#policy}, block ${event.block + 1}: ${masked} of ${total} tokens masked. ${words}`,
    );
  }

  #describe(event) {
    const counts = event.experts.map((ids) => ids.length);
    this.#find(".experts").textContent = `${bytes(event.expert_bytes)} in this step`;
    this.#find(".heat").setAttribute("aria-label", `Experts used in this step, by layer: ${counts.join(", ")}`);
  }

  #write(text, complete = false) {
    const answer = this.#find(".answer");
    const nothing = complete ? "The answer is empty." : "Block by block, the answer comes here.";
    answer.classList.toggle("empty", text === "");
    answer.textContent = text === "" ? nothing : text;
    answer.scrollTop = answer.scrollHeight;
  }
}

function visible(token) {
  if (token.role === END) return END;
  const text = token.text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
  return text.trim() === "" ? text.replaceAll(" ", "␣") : text.trim();
}
