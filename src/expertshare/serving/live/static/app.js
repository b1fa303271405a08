// The page as a whole: the form, one trace at a time, and who shows what of it.

import { Comparison } from "./comparison.js";
import { millions } from "./format.js";
import { Half } from "./half.js";
import { Playback } from "./playback.js";
import { TraceError, settings, trace } from "./trace.js";

const by = (id) => document.getElementById(id);
const form = by("ask");
const halves = ["a", "b"].map((side) => new Half(by("half"), side));
const playbacks = halves.map((half, index) => new Playback((frame) => play(index, frame)));
const comparison = new Comparison();
const PATIENCE = 5000; // milliseconds

let model = null;
let attempts = 0; // to get the server's settings
let running = null; // the AbortController of the trace on its way
let names = ["", ""]; // policies of the trace that is shown
let stopped = -Infinity; // when a trace was last stopped here
let totals = null; // of a trace whose last event has come, until both sides have shown everything

by("halves").append(...halves.map((half) => half.element));

function say(text) {
  by("status").textContent = text;
}

function complain(message, field = null) {
  const box = by("error");
  box.textContent = message;
  box.hidden = message === "";
  for (const id of ["prompt", "tokens", "seed", "key"]) by(id).removeAttribute("aria-invalid");
  if (field) {
    field.setAttribute("aria-invalid", "true");
    field.focus();
  }
}

function policies() {
  return [by("policy-a").value, by("policy-b").value];
}

function clear() {
  playbacks.forEach((playback) => playback.clear());
  totals = null;
  names = policies();
  halves.forEach((half, index) => half.reset(names[index], model));
  comparison.reset(names);
}

function wholeNumber(field, name) {
  const value = Number(field.value);
  const [least, most] = [Number(field.min), field.max === "" ? Number.MAX_SAFE_INTEGER : Number(field.max)];
  if (field.value !== "" && Number.isSafeInteger(value) && value >= least && value <= most) return value;
  complain(`${name} must be a whole number in ${least}..${most}.`, field);
  return null;
}

function request() {
  const prompt = by("prompt").value;
  if (prompt.trim() === "") {
    complain("Write a prompt first, or take one of the examples.", by("prompt"));
    return null;
  }
  const max_tokens = wholeNumber(by("tokens"), "Tokens");
  const seed = max_tokens === null ? null : wholeNumber(by("seed"), "Seed");
  if (seed === null) return null;
  const asked = { prompt, policies: policies(), max_tokens, seed };
  return by("writes").value === "" ? asked : { ...asked, tokens_per_step: Number(by("writes").value) };
}

function work(on) {
  const focused = document.activeElement;
  by("start").disabled = on;
  by("stop").disabled = !on;
  form.classList.toggle("running", on);
  document.body.dataset.state = on ? "running" : "idle";
  if (on && focused === by("start")) by("stop").focus();
  if (!on && focused === by("stop")) by("start").focus();
}

async function start() {
  if (by("start").disabled) return;
  if (model === null) {
    begin(); // the server has not let us in yet
    return;
  }
  complain("");
  const asked = request();
  if (asked === null) return;
  clear();
  const controller = new AbortController();
  running = controller;
  work(true);
  say("Asking the server…");
  try {
    await follow(asked, controller);
  } catch (error) {
    if (running !== controller) return; // stopped, and perhaps begun anew
    fail(error);
  }
}

// The server ends a stopped trace after the step that it is at; who starts again at once waits that long.
async function follow(asked, controller) {
  for (;;) {
    try {
      return await trace(asked, { signal: controller.signal, key: by("key").value, onEvent: hear });
    } catch (error) {
      if (error.status !== 429 || performance.now() > stopped + PATIENCE || running !== controller) throw error;
      await new Promise((resolve) => setTimeout(resolve, 250));
    }
  }
}

// Says what was wrong; where the server wants a key, the page asks for one.
function refuse(error) {
  if (error.status === 401) by("key-field").hidden = false;
  complain(error.message, error.status === 401 ? by("key") : null);
}

function fail(error) {
  playbacks.forEach((playback) => playback.flush());
  stop("", "broken off");
  refuse(error);
  if (!(error instanceof TraceError)) throw error;
}

function stop(text, state = "stopped") {
  if (running === null) return;
  const controller = running;
  running = null;
  totals = null;
  stopped = performance.now();
  controller.abort();
  playbacks.forEach((playback) => playback.clear());
  halves.forEach((half) => half.state(state));
  work(false);
  say(text);
}

function hear(event) {
  if (event.type === "start") {
    model = event.model;
    halves.forEach((half) => half.state("waiting"));
    say("Decoding…");
  } else if (event.type === "end") {
    totals = event.runs;
    finish();
  } else {
    const playback = playbacks[event.run];
    playback.pace = Number(by("pace").value);
    // a block is shown in masks for one beat before its first step, so that one sees what is filled in
    if (event.type === "step" && event.step === 0) playback.add({ show: "open", event, takesTime: true });
    playback.add({ show: event.type, event, takesTime: event.type === "step" });
  }
}

function play(index, { show, event }) {
  halves[index][show](event);
  if (show === "block") say(`${names[index]}: block ${event.block + 1} decided`);
  finish();
}

function finish() {
  if (totals === null || !playbacks.every((playback) => playback.idle)) return;
  halves.forEach((half, index) => half.totals(totals[index]));
  comparison.show(totals);
  say("Done.");
  totals = null;
  running = null;
  work(false);
}

function offer(select, values, chosen) {
  select.replaceChildren(...values.map((value) => new Option(value, value, value === chosen, value === chosen)));
}

function example(text) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.addEventListener("click", () => {
    by("prompt").value = text;
    by("prompt").focus();
  });
  return button;
}

function facts({ name, num_parameters, num_moe_layers, num_experts, experts_per_token, block_length }) {
  return (
    `${name}: ${millions(num_parameters)} parameters, ${num_moe_layers} MoE layers of ${num_experts} experts, ` +
    `${experts_per_token} per token, blocks of ${block_length}`
  );
}

async function begin() {
  const attempt = (attempts += 1);
  document.body.dataset.state = "loading";
  let given;
  try {
    given = await settings(by("key").value);
  } catch (error) {
    if (attempt === attempts) refuse(error);
    return;
  }
  if (attempt !== attempts) return; // another key has been tried meanwhile
  complain("");
  const { limits } = given;
  model = given.model;
  offer(by("policy-a"), limits.policies, limits.policies[0]);
  offer(by("policy-b"), limits.policies, limits.policies[1] ?? limits.policies[0]);
  by("tokens").max = limits.max_tokens;
  by("tokens").value = limits.default_tokens;
  if (model.whole_canvas) by("tokens").step = model.block_length;
  by("prompt").maxLength = limits.max_prompt_chars;
  by("seed").title = model.temperature === 0 ? "Without effect: this server decodes at temperature 0" : "";
  if (model.threshold !== null) by("by-confidence").textContent = `tokens above ${model.threshold}`;
  by("examples").replaceChildren(...limits.examples.map(example));
  by("model").textContent = facts(model);
  by("prompt").value = limits.examples[0] ?? "";
  clear();
  work(false);
  say("Ready.");
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  start();
});
by("stop").addEventListener("click", () => stop("Stopped."));
for (const id of ["policy-a", "policy-b"]) {
  by(id).addEventListener("change", () => {
    if (running === null && model !== null) clear();
  });
}
document.addEventListener("keydown", (event) => {
  if (event.isComposing) return;
  if (event.key === "Escape") stop("Stopped.");
  const inPrompt = event.target === by("prompt") && !event.shiftKey && !event.altKey;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey || inPrompt)) {
    event.preventDefault();
    start();
  }
});
addEventListener("pagehide", () => running?.abort());

begin();
