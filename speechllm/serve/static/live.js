import { Captions } from "./captions.js";
import { level, openMicrophone } from "./microphone.js";
import { LiveTranscription } from "./realtime.js";

const SILENCE = 4; // seconds from the start after which a person is asked whether the microphone is on
const SOFTEST = 0.1; // level of a microphone that is on

/** The button, the microphone behind it, and the captions. */
export class LivePanel {
  /** @param {(id: string) => HTMLElement} byId */
  constructor(byId) {
    this.byId = byId;
    this.captions = new Captions(byId("captions"), byId("announcer"));
    this.transcription = null; // from the press of the button until the last words have come
    this.microphone = null; // while it is open
    byId("clear-captions").addEventListener("click", () => {
      this.captions.clear();
      this.showTools();
      byId("listen").focus();
    });
  }

  /** Start, stop, or, while the last words are awaited, end at once. */
  async toggle(model, choices) {
    if (this.microphone) await this.stop();
    else if (this.transcription) this.transcription.stop();
    else await this.start(model, choices);
  }

  /** Another language or task was chosen. */
  configure(choices) {
    this.transcription?.configure(choices);
  }

  async start(model, choices) {
    const { byId } = this;
    byId("live-error").textContent = byId("delay").textContent = "";
    byId("listen").disabled = true; // while the browser asks for the microphone
    try {
      this.microphone = await openMicrophone(
        (samples) => this.heard(samples),
        () => this.microphoneLost(),
      );
    } catch (error) {
      byId("live-error").textContent = error.message;
      return;
    } finally {
      byId("listen").disabled = false;
    }
    this.silentSince = performance.now();
    this.transcription = new LiveTranscription(model.id, choices, {
      status: (text) => (byId("live-status").textContent = text),
      error: (message) => (byId("live-error").textContent = message),
      restart: () => this.captions.dropPartial(),
      text: (...caption) => this.captions.extend(...caption),
      completed: (...caption) => {
        this.captions.complete(...caption);
        this.showTools();
      },
      failed: (...caption) => this.captions.fail(...caption),
      delay: (seconds) => (byId("delay").textContent = `Delay ${seconds.toFixed(1)} s`),
      ended: () => this.ended(),
    });
    this.showButton("Stop", true);
    this.transcription.connect();
  }

  heard(samples) {
    this.transcription?.append(samples);
    const now = level(samples);
    this.byId("level").value = now;
    if (now > SOFTEST) this.silentSince = Infinity; // it is on, and pauses are no fault
    this.byId("live-hint").hidden = performance.now() - this.silentSince < SILENCE * 1000;
  }

  async stop() {
    const { transcription } = this;
    this.showButton("Stop now", true);
    await this.closeMicrophone();
    transcription?.stop();
  }

  async closeMicrophone() {
    const { microphone } = this;
    this.microphone = null;
    await microphone?.close(); // gives its last samples
    this.byId("level").value = 0;
    this.byId("live-hint").hidden = true;
  }

  microphoneLost() {
    this.stop();
    this.byId("live-error").textContent = "The microphone has gone. Connect it and start again.";
  }

  async ended() {
    this.transcription = null;
    this.captions.settle();
    this.showTools();
    this.showButton("Start listening", false);
    this.byId("live-status").textContent = "Stopped";
    await this.closeMicrophone();
  }

  showButton(text, isListening) {
    this.byId("listen").textContent = text;
    this.byId("listen").classList.toggle("listening", isListening);
  }

  showTools() {
    this.byId("captions-tools").hidden = this.captions.text === "";
  }
}
