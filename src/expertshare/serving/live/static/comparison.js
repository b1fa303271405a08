// Totals of both runs, and the ratio between them.

import { NONE, bytes, ratio, three } from "./format.js";

const MEASURES = [
  { name: "unique experts, per block and layer", of: (run) => run.unique_experts, as: three },
  { name: "expert bytes read", of: (run) => run.expert_bytes, as: bytes },
  { name: "tokens per second", of: (run) => run.tokens_per_s, as: three },
  { name: "denoising steps", of: (run) => run.steps, as: String },
  { name: "answer tokens", of: (run) => run.tokens, as: String },
];

export class Comparison {
  #rows;
  #verdict = document.getElementById("verdict");

  constructor() {
    this.#rows = MEASURES.map(({ name }) => {
      const row = document.createElement("tr");
      const head = document.createElement("th");
      head.scope = "row";
      head.textContent = name;
      const cells = Array.from({ length: 3 }, () => document.createElement("td"));
      cells[2].className = "ratio";
      row.append(head, ...cells);
      return { row, cells };
    });
    document.getElementById("totals").replaceChildren(...this.#rows.map(({ row }) => row));
  }

  reset(policies, sentence = "Totals appear here when both have finished.") {
    document.getElementById("name-a").textContent = policies[0];
    document.getElementById("name-b").textContent = policies[1];
    for (const { cells } of this.#rows) cells.forEach((cell) => (cell.textContent = NONE));
    this.#verdict.textContent = sentence;
    this.#verdict.classList.remove("ready");
  }

  show([left, right]) {
    MEASURES.forEach(({ of, as }, index) => {
      const { cells } = this.#rows[index];
      cells[0].textContent = as(of(left));
      cells[1].textContent = as(of(right));
      cells[2].textContent = ratio(of(right), of(left));
    });
    this.#verdict.textContent = this.sentence(left, right);
    this.#verdict.classList.add("ready");
  }

  sentence(left, right) {
    const names = left.policy === right.policy ? ["the left run", "The right run"] : [left.policy, right.policy];
    const same = left.text === right.text ? "Both give the same answer." : "The two answers differ.";
    return (
      `${names[1]} used ${ratio(right.unique_experts, left.unique_experts)} the experts per block ` +
      `and read ${ratio(right.expert_bytes, left.expert_bytes)} the expert bytes of ${names[0]}. ${same}`
    );
  }
}
