// The server's interface, as docs/guides/serving.md describes it.

/** A request was refused or did not get through: the message says why and what to do. */
export class ServerError extends Error {
  /** @param {number} status of HTTP; 0: the server did not answer */
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

const NO_ANSWER = "The server does not answer. Check that it is running and that the network is up, then try again.";
const KEY = "speechllm.key";

/** The key is kept in this tab only: not in a cookie, not on the disk. */
export const apiKey = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (key) => sessionStorage.setItem(KEY, key),
};

/** @returns {string} a message of the server as a sentence of the page */
export function sentence(message) {
  return message[0].toUpperCase() + message.slice(1) + (/[.!?]$/.test(message) ? "" : ".");
}

function address(path) {
  return new URL(path, document.baseURI); // beside this page, also behind a proxy's prefix
}

async function request(path, options = {}) {
  const key = apiKey.get();
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  let response;
  try {
    response = await fetch(address(path), { headers, ...options });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ServerError(NO_ANSWER, 0);
  }
  const body = await response.json().catch(() => null);
  if (response.ok && body !== null) return body;
  if (response.status === 401) throw new ServerError("The API key is missing or wrong. Enter it above.", 401);
  const said = body?.error?.message ?? `the server answered ${response.status} ${response.statusText}`;
  throw new ServerError(sentence(said), response.status);
}

/** @returns {Promise<object>} what `/v1/models` says of the model */
export async function loadModel() {
  return (await request("v1/models")).data[0];
}

/**
 * Transcribes or translates a recording.
 *
 * @param {File} file
 * @param {object} model of `loadModel`
 * @param {{language: string, target: string}} choices empty: the server's default; a transcript
 * @param {AbortSignal} signal
 * @returns {Promise<object>} OpenAI's `verbose_json`
 */
export async function transcribeFile(file, model, { language, target }, signal) {
  const form = new FormData();
  form.append("file", file);
  form.append("model", model.id);
  form.append("response_format", "verbose_json");
  form.append("timestamp_granularities[]", "segment");
  if (language) form.append("language", language);
  if (target) form.append("target_language", target);
  else if (model.speechllm.word_times) form.append("timestamp_granularities[]", "word");
  const path = target ? "v1/audio/translations" : "v1/audio/transcriptions";
  return request(path, { method: "POST", body: form, signal });
}

/**
 * @param {string} model its name
 * @returns {WebSocket} for live audio
 * @throws {ServerError} the key has characters that cannot be sent
 */
export function openRealtime(model) {
  const url = address(`v1/realtime?intent=transcription&model=${encodeURIComponent(model)}`);
  url.protocol = url.protocol.replace("http", "ws");
  const key = apiKey.get();
  try {
    // A browser cannot set headers of a WebSocket: the key goes where the subprotocol is named.
    return new WebSocket(url, key ? ["realtime", `openai-insecure-api-key.${key}`] : ["realtime"]);
  } catch {
    throw new ServerError("The API key has characters that no key has. Enter it again.", 401);
  }
}

/**
 * Why a WebSocket did not open: browsers do not say.
 *
 * @returns {Promise<ServerError>}
 */
export async function whyRefused() {
  try {
    await loadModel();
    const { streams, max_streams } = await request("health");
    if (streams >= max_streams) return new ServerError("All places of the server are taken.", 429);
    return new ServerError("The connection to the server broke.", 0);
  } catch (error) {
    return error.status === 0 ? new ServerError("The server does not answer.", 0) : error;
  }
}
