import { openRealtime, sentence, ServerError, whyRefused } from "./server.js";

const RATE = 16000;
const MOST_KEPT = 120 * RATE; // samples that are kept for a connection that comes back
const LONGEST_WAIT = 15; // seconds between two tries to connect

/**
 * Live audio to text over `/v1/realtime`. A lost connection is opened again, and gets again what had been said and was
 * not completed yet: nothing is lost but the time.
 *
 * What happens is told to the functions of `on`:
 * - `status(text)`: what the connection does now
 * - `error(message)`: something that a person should know; "" when it is over
 * - `restart()`: the captions that are not completed will come once more
 * - `text(id, text, words, unstable)`: more text of a caption, and what may still follow
 * - `completed(id, transcript, words)`, `failed(id, message)`: the end of a caption
 * - `delay(seconds)`: from the end of a word until its text came
 * - `ended()`: nothing more will come
 */
export class LiveTranscription {
  /**
   * @param {string} model its name
   * @param {{language: string, target: string}} choices empty: the server's default; a transcript
   */
  constructor(model, choices, on) {
    Object.assign(this, { model, choices, on });
    this.kept = []; // blocks of samples that are not written down for certain: {samples, start, captured}
    this.captured = 0; // samples since the beginning
    this.done = 0; // of these, up to the end of the last item
    this.connection = 0; // how many have been opened
    this.tries = 0; // to connect, since it was last connected
    this.isStopping = this.hasEnded = false;
  }

  /** Open the connection; samples may be given before it is open. */
  connect() {
    this.wasReady = false;
    this.fault = ""; // what the server said of this connection before it closed it
    try {
      this.socket = openRealtime(this.model);
    } catch (error) {
      this.end(error.message);
      return;
    }
    this.on.status("Connecting…");
    this.socket.onopen = () => this.begin();
    this.socket.onmessage = ({ data }) => this.receive(JSON.parse(data));
    this.socket.onclose = () => this.closed();
  }

  /** @param {Int16Array} samples the next ones, 16 kHz */
  append(samples) {
    const block = { samples, start: this.captured, captured: performance.now() };
    this.kept.push(block);
    this.captured += samples.length;
    this.forget(this.captured - MOST_KEPT);
    if (this.wasReady) this.sendBlock(block);
  }

  /** Change the language or the task from now on. */
  configure(choices) {
    this.choices = choices;
    if (this.wasReady) this.sendSession();
  }

  /** Finish what was said, then close. A second call closes at once. */
  stop() {
    if (this.isStopping || this.captured === 0) {
      this.end();
      return;
    }
    this.isStopping = true;
    this.on.status("Finishing…");
    if (this.wasReady) this.send({ type: "input_audio_buffer.commit" });
  }

  end(message = "") {
    if (this.hasEnded) return;
    this.hasEnded = true;
    clearTimeout(this.timer);
    this.socket?.close(1000);
    if (message) this.on.error(message);
    this.on.ended();
  }

  // ---------------------------------------------------------------------------------------------------------------
  // To the server

  begin() {
    this.connection += 1;
    this.tries = 0;
    this.wasReady = true;
    this.origin = this.kept[0]?.start ?? this.captured; // the server counts seconds from here
    this.on.error("");
    this.on.status(this.isStopping ? "Finishing…" : "Listening");
    this.sendSession();
    for (const block of this.kept) this.sendBlock(block);
    if (this.isStopping) this.send({ type: "input_audio_buffer.commit" });
  }

  send(message) {
    this.socket.send(JSON.stringify(message)); // does nothing when the connection is closing
  }

  sendSession() {
    const { language, target } = this.choices;
    const transcription = { model: this.model, language: language || null, target_language: target || null };
    const input = { format: { type: "audio/pcm", rate: RATE }, transcription, turn_detection: { type: "server_vad" } };
    this.send({ type: "session.update", session: { type: "transcription", audio: { input } } });
  }

  sendBlock({ samples }) {
    if (samples.length) this.send({ type: "input_audio_buffer.append", audio: base64(samples) });
  }

  // ---------------------------------------------------------------------------------------------------------------
  // From the server

  receive(event) {
    if (this.hasEnded) return; // it was on its way
    const id = `${this.connection}.${event.item_id}`; // each connection counts its items anew
    switch (event.type) {
      case "conversation.item.input_audio_transcription.delta":
        this.on.text(id, event.delta, event.words ?? [], event.unstable ?? "");
        if (event.delta) this.tellDelay(event.words?.at(-1)?.end ?? event.audio_end);
        break;
      case "conversation.item.input_audio_transcription.completed":
        this.on.completed(id, event.transcript, event.words ?? []);
        this.itemEnded(event.end);
        break;
      case "conversation.item.input_audio_transcription.failed":
        this.on.failed(id, sentence(event.error.message));
        this.itemEnded(event.end);
        break;
      case "error":
        this.refused(event.error);
        break;
    }
  }

  itemEnded(seconds) {
    this.done = this.sample(seconds);
    this.forget(this.done);
    this.endIfDone();
  }

  /** The item of a commit ends with the last sample, but for rounding. */
  endIfDone() {
    if (this.isStopping && this.captured - this.done < RATE / 10) this.end();
  }

  refused({ code, message: said }) {
    const message = sentence(said);
    if (code === "input_audio_buffer_commit_empty") {
      this.endIfDone(); // or the item of what was said before is still to come
    } else if (code === "invalid_value") {
      this.end(message); // of the language or the task: what is heard would be written wrongly
    } else {
      this.fault = message;
      this.on.error(message);
    }
  }

  sample(seconds) {
    return this.origin + Math.round(seconds * RATE);
  }

  tellDelay(seconds) {
    const sample = this.sample(seconds);
    const block = this.kept.find(({ start, samples }) => sample <= start + samples.length);
    if (!block) return;
    const spoken = block.captured - ((block.start + block.samples.length - sample) / RATE) * 1000;
    this.on.delay((performance.now() - spoken) / 1000);
  }

  /** Samples before this one need not be sent again. */
  forget(sample) {
    while (this.kept.length && this.kept[0].start + this.kept[0].samples.length <= sample) this.kept.shift();
    const [first] = this.kept;
    if (first && first.start < sample) {
      first.samples = first.samples.subarray(sample - first.start);
      first.start = sample;
    }
  }

  async closed() {
    if (this.hasEnded) return;
    const wasReady = this.wasReady;
    this.wasReady = false;
    this.on.restart();
    const lost = new ServerError(this.fault || "The connection to the server was lost.", 0);
    const why = wasReady ? lost : await whyRefused();
    if (this.hasEnded) return; // stopped meanwhile
    if (why.status === 401 || why.status === 403 || why.status === 404) {
      this.end(why.message);
      return;
    }
    const wait = Math.min(LONGEST_WAIT, 2 ** this.tries++);
    this.on.status("Not connected");
    this.on.error(`${why.message} Trying again in ${wait} s; what you say meanwhile is kept.`);
    this.timer = setTimeout(() => this.connect(), wait * 1000);
  }
}

function base64(samples) {
  const bytes = new Uint8Array(samples.buffer, samples.byteOffset, samples.byteLength);
  return btoa(String.fromCharCode(...bytes));
}
