// POST /live/trace and its server-sent events. (EventSource cannot POST.)

export class TraceError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

// Calls onEvent with every event. Resolves when the server has sent the last one; rejects with a TraceError, or with
// an AbortError once `signal` is aborted.
export async function trace(request, { signal, key, onEvent }) {
  const headers = { "Content-Type": "application/json", ...bearer(key) };
  const response = await reach(() =>
    fetch("/live/trace", { method: "POST", headers, body: JSON.stringify(request), signal }),
  );
  if (!response.ok) throw new TraceError(await reason(response), response.status);
  let ended = false;
  for await (const event of events(response.body)) {
    if (event.type === "error") throw new TraceError(event.message);
    ended = ended || event.type === "end";
    onEvent(event);
  }
  if (!ended) throw new TraceError("The server stopped before the trace was complete. Its log says why.");
}

export async function settings(key) {
  const response = await reach(() => fetch("/live/settings", { headers: bearer(key) }));
  if (!response.ok) throw new TraceError(await reason(response), response.status);
  return response.json();
}

function bearer(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function reach(ask) {
  try {
    return await ask();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new TraceError("The server cannot be reached. Is it still running?");
  }
}

async function reason(response) {
  try {
    const body = await response.json();
    return body.error?.message ?? `The server answered ${response.status}.`;
  } catch {
    return `The server answered ${response.status}.`;
  }
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reach(() => reader.read());
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice(6));
    }
  }
}
