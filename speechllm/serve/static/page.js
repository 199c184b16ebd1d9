// Wires the page: what the model can do, the key, live captions, a recording.

import { LivePanel } from "./live.js";
import { RecordingPanel } from "./recording.js";
import { apiKey, loadModel } from "./server.js";

// For models that do not say which languages they know.
const USUAL_LANGUAGES = "ar de en es fr hi id it ja ko nl pl pt ru sv tr uk vi zh".split(" ");

const byId = (id) => document.getElementById(id);
const names = new Intl.DisplayNames("en", { type: "language" });

const live = new LivePanel(byId);
const recording = new RecordingPanel(byId);
let model; // of `loadModel`
byId("key-box").hidden = apiKey.get() === ""; // until the server asks for one

// -----------------------------------------------------------------------------------------------------------------
// The model and the choices it leaves

async function start() {
  try {
    model = await loadModel();
  } catch (error) {
    const isKey = error.status === 401;
    if (isKey) byId("key-box").open = true;
    byId("key-box").hidden &&= !isKey;
    const isWrong = isKey && apiKey.get() !== "";
    byId("key-error").textContent = isWrong ? "The server does not take this key. Enter another one." : "";
    byId("page-error").textContent = isKey ? "This server asks for an API key: enter it below." : error.message;
    return;
  }
  byId("page-error").textContent = byId("key-error").textContent = "";
  byId("model").textContent = model.id;
  offerChoices(model.speechllm);
  byId("listen").disabled = byId("file").disabled = false;
}

function offerChoices({ languages, default_language, needs_language, target_languages }) {
  const known = (languages.length ? languages : USUAL_LANGUAGES).map((tag) => new Option(nameOf(tag), tag));
  known.sort((a, b) => a.text.localeCompare(b.text));
  if (!needs_language && !default_language) known.unshift(new Option("Automatic", ""));
  byId("language").replaceChildren(...known);
  const mine = known.find(({ value }) => needs_language && value === navigator.language.split("-")[0]);
  byId("language").value = default_language ?? (mine ?? known[0]).value;
  const tasks = target_languages.map((tag) => new Option(`Translate to ${nameOf(tag)}`, tag));
  byId("task").replaceChildren(new Option("Transcribe", ""), ...tasks);
  byId("task-choice").hidden = tasks.length === 0;
}

function nameOf(tag) {
  try {
    return names.of(tag);
  } catch {
    return tag; // a name of the model's own
  }
}

function choices() {
  return { language: byId("language").value, target: byId("task").value };
}

// -----------------------------------------------------------------------------------------------------------------
// What a person does

byId("choices").addEventListener("change", () => live.configure(choices()));
byId("choices").addEventListener("submit", (event) => event.preventDefault());
byId("listen").addEventListener("click", () => live.toggle(model, choices()));

/** Browsers let a page write to the clipboard where they give it the microphone: https and localhost. */
function offerCopy(id, text) {
  const button = byId(id);
  button.hidden = !navigator.clipboard;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(text());
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy text"), 1500);
  });
}

offerCopy("copy-captions", () => live.captions.text);
offerCopy("copy-transcript", () => recording.text);

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey.set(byId("key").value.trim());
  byId("key").value = "";
  start();
});

function transcribe(files) {
  if (model && files.length) recording.transcribe(files[0], model, choices());
}

byId("file").addEventListener("change", ({ target }) => {
  transcribe(target.files);
  target.value = ""; // the same file may be chosen again
});

// Files may be dropped anywhere: beside the frame the browser would open them in place of this page.
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", ({ relatedTarget }) => {
  if (!relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  transcribe(event.dataTransfer.files);
});

start();
