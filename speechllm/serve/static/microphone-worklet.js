// Runs in the browser's audio thread: the microphone's samples in, blocks of 16-bit samples at 16 kHz out.

import { Resampler } from "./resample.js";

const RATE = 16000;
const BLOCK = RATE / 10; // a tenth of a second: small beside the delay of speech recognition, few messages

class Microphone extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = new Resampler(sampleRate, RATE);
    this.block = new Int16Array(BLOCK);
    this.filled = 0;
    this.isOpen = true;
    this.port.onmessage = () => this.end(); // the only message there is
  }

  process([channels]) {
    if (channels.length === 0) return this.isOpen; // the microphone sends nothing yet
    for (const sample of this.resampler.push(channels[0])) {
      this.block[this.filled++] = Math.max(-32768, Math.min(32767, Math.round(sample * 32768)));
      if (this.filled === BLOCK) this.send();
    }
    return this.isOpen;
  }

  send() {
    this.port.postMessage(this.block.slice(0, this.filled));
    this.filled = 0;
  }

  end() {
    this.isOpen = false;
    this.send();
    this.port.postMessage(null); // that was all
  }
}

registerProcessor("microphone", Microphone);
