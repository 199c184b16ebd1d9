import { transcribeFile } from "./server.js";
import { Waveform } from "./waveform.js";
import { Words } from "./words.js";

/** A file that is chosen or dropped: its transcript, whose words can be heard, on its waveform. */
export class RecordingPanel {
  /** @param {(id: string) => HTMLElement} byId */
  constructor(byId) {
    this.byId = byId;
    this.audio = byId("audio");
    this.waveform = new Waveform(byId("overview"), byId("detail"), (seconds) => this.play(seconds));
    this.shown = new Words(byId("transcript"), ({ start }) => this.play(start));
    this.words = [];
    this.audio.addEventListener("play", () => this.follow());
    for (const name of ["timeupdate", "seeked"]) this.audio.addEventListener(name, () => this.showPlace());
    byId("cancel").addEventListener("click", () => this.request.abort());
  }

  get text() {
    return [...this.byId("transcript").children].map((item) => item.textContent).join("\n");
  }

  /**
   * @param {File} file
   * @param {object} model of `loadModel`
   * @param {{language: string, target: string}} choices
   */
  async transcribe(file, model, choices) {
    this.request?.abort();
    const request = (this.request = new AbortController());
    this.byId("recording-error").textContent = "";
    this.byId("player").hidden = true;
    const error = tooLarge(file, model);
    if (error) {
      this.byId("recording-error").textContent = error;
      return;
    }
    const began = performance.now();
    const seconds = () => ((performance.now() - began) / 1000).toFixed(1);
    const status = this.byId("recording-status");
    status.textContent = `Transcribing ${file.name}…`;
    this.byId("cancel").hidden = false;
    try {
      const result = await transcribeFile(file, model, choices, request.signal);
      status.textContent = `${file.name}: ${result.duration.toFixed(1)} s of audio, transcribed in ${seconds()} s`;
      await this.show(file, result);
    } catch (error) {
      if (this.request !== request) return; // another file was dropped meanwhile
      status.textContent = error.name === "AbortError" ? "Canceled." : "";
      if (error.name !== "AbortError") this.byId("recording-error").textContent = `${file.name}: ${error.message}`;
    } finally {
      if (this.request === request) this.byId("cancel").hidden = true;
    }
  }

  async show(file, { text, segments, words }) {
    URL.revokeObjectURL(this.audio.src);
    this.audio.src = URL.createObjectURL(file);
    const lines = linesOf(text, segments ?? [], words ?? []);
    this.words = lines.flatMap((line) => line.words);
    this.byId("transcript").replaceChildren(
      ...lines.map((line) => {
        const item = document.createElement("p");
        item.append(this.shown.show(line.text, line.words));
        return item;
      }),
    );
    this.byId("word-hint").hidden = this.words.length === 0;
    this.byId("player").hidden = false;
    try {
      await this.waveform.load(file);
      this.waveform.words = this.words;
      this.byId("waveform").hidden = false;
    } catch {
      this.byId("waveform").hidden = true; // a format that the server reads and this browser does not
    }
  }

  play(seconds) {
    this.audio.currentTime = seconds;
    this.audio.play().catch(() => {}); // the player itself shows what it cannot play
  }

  /** While it plays, with each picture of the screen; where motion is not wanted, `timeupdate` is enough. */
  follow() {
    if (this.audio.paused || matchMedia("(prefers-reduced-motion: reduce)").matches) return;
    this.showPlace();
    requestAnimationFrame(() => this.follow());
  }

  showPlace() {
    const now = this.audio.currentTime;
    const played = this.words.find(({ start, end }) => start <= now && now < end)?.element;
    if (played !== this.played) {
      this.played?.removeAttribute("aria-current");
      played?.setAttribute("aria-current", "true");
      this.played = played;
    }
    this.waveform.show(now);
  }
}

/** One line for each segment, with its words; where words have no times, a segment is one word. */
function linesOf(text, segments, words) {
  if (segments.length === 0) return [{ text, words }];
  let next = 0;
  return segments.map((segment, i) => {
    const line = segment.text.trim();
    if (words.length === 0) return { text: line, words: [{ word: line, start: segment.start, end: segment.end }] };
    const first = next;
    const isLast = i === segments.length - 1;
    while (next < words.length && (isLast || words[next].start < segment.end)) next++;
    return { text: line, words: words.slice(first, next) };
  });
}

function tooLarge(file, model) {
  const most = model.speechllm.max_upload_bytes;
  if (file.size <= most) return "";
  const megabytes = (bytes) => `${(bytes / 2 ** 20).toFixed(0)} MB`;
  return (
    `${file.name} has ${megabytes(file.size)}; this server takes at most ${megabytes(most)}. ` +
    "Choose a shorter part of it, or a compressed form such as FLAC, MP3 or Opus."
  );
}
