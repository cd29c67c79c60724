// The server's interface: OpenAI's form, and what `mmv serve` adds.

/** The server could not be reached, or its answer broke off. */
export class Gone extends Error {}

/** The server answered with an error: its HTTP status (0: inside a stream), and seconds to wait where it names them. */
export class Refused extends Error {
  constructor(message, status, wait = null) {
    super(message);
    Object.assign(this, { status, wait });
  }
}

let key = "";
try {
  key = sessionStorage.getItem("mmv.key") ?? "";
} catch {}

/** Use an API key until the tab is closed. */
export function useKey(text) {
  key = text;
  try {
    sessionStorage.setItem("mmv.key", text);
  } catch {} // then until the page is reloaded
}

/** Call the server. Raises Refused, Gone, or the abort of `signal`. */
async function call(path, body = null, signal = null) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const post = body && {
    method: "POST",
    body: JSON.stringify(body),
    headers: { ...headers, "Content-Type": "application/json" },
  };
  let response;
  try {
    response = await fetch(path, { headers, signal, cache: "no-store", ...post });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Gone(error.message);
  }
  if (response.ok) return response;
  const message = await response.json().then(
    (json) => json.error?.message,
    () => "",
  );
  const wait = Number(response.headers.get("Retry-After"));
  throw new Refused(message || "", response.status, Number.isFinite(wait) && wait > 0 ? wait : null);
}

export const models = async () => (await (await call("/v1/models")).json()).data ?? [];

/** Examples of the demo's world: `[{ image, question, answer }]`; none where the server has none. */
export const examples = async () => (await (await call("/v1/examples")).json()).examples;

/** Whether the server can give answers. */
export const isHealthy = async () =>
  call("/health", null, AbortSignal.timeout(5000)).then(
    () => true,
    () => false,
  );

export const look = async (body, signal) => (await call("/v1/look", body, signal)).json();

/** A file of the page as a Blob. */
export const file = async (path) => (await call(path)).blob();

/** The chunks of a streamed answer. Raises Refused for an error in the stream, Gone where it ends before its end. */
export async function* answer(body, signal) {
  const response = await call(
    "/v1/chat/completions",
    { ...body, stream: true, stream_options: { include_usage: true } },
    signal,
  );
  for await (const data of events(response.body, signal)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refused(chunk.error.message || "", 0);
    yield chunk;
  }
  throw new Gone("the stream ended before the answer did");
}

/** The data of each server-sent event. */
async function* events(stream, signal) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      buffer += value;
      const blocks = buffer.split(/\r?\n\r?\n/);
      buffer = blocks.pop();
      for (const block of blocks) {
        const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Gone(error.message);
  } finally {
    reader.cancel().catch(() => {});
  }
}
