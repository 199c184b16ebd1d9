const WORKLET = new URL("microphone-worklet.js", import.meta.url);

/** What a person can mend: its message says how. */
export class MicrophoneError extends Error {}

/**
 * Listens to the microphone until `close` is called.
 *
 * @param {(samples: Int16Array) => void} onSamples called with each tenth of a second, 16 kHz
 * @param {() => void} onLost called when the microphone has gone, for example unplugged
 * @returns {Promise<{close: () => Promise<void>}>} after `close` has resolved, the last samples have come
 * @throws {MicrophoneError} there is none, or it may not be used
 */
export async function openMicrophone(onSamples, onLost) {
  const stream = await askForMicrophone();
  const context = new AudioContext();
  try {
    await context.audioWorklet.addModule(WORKLET);
    await context.resume();
  } catch (error) {
    stop(stream, context);
    throw new MicrophoneError(`The browser cannot process sound: ${error.message}. Reload, or use another browser.`);
  }
  const worklet = new AudioWorkletNode(context, "microphone", { channelCount: 1, channelCountMode: "explicit" });
  context.createMediaStreamSource(stream).connect(worklet);
  worklet.connect(context.destination); // it puts nothing out, but is only run if it is connected
  const ended = new Promise((resolve) => {
    worklet.port.onmessage = ({ data }) => (data === null ? resolve() : onSamples(data));
  });
  stream.getAudioTracks()[0].onended = onLost;
  return {
    async close() {
      worklet.port.postMessage("end");
      await ended;
      stop(stream, context);
    },
  };
}

async function askForMicrophone() {
  if (!navigator.mediaDevices) {
    throw new MicrophoneError(
      "Browsers give the microphone only to pages at https:// or at localhost. Open this page at such an address, " +
        "for example by an SSH tunnel: ssh -L 8000:localhost:8000 HOST.",
    );
  }
  try {
    // Models learn from speech as it is: what takes out noise and echo also changes the speech.
    const audio = { channelCount: 1, noiseSuppression: false, echoCancellation: false, autoGainControl: true };
    return await navigator.mediaDevices.getUserMedia({ audio });
  } catch (error) {
    const messages = {
      NotAllowedError: "The browser may not use the microphone. Allow it for this page, beside its address.",
      NotFoundError: "No microphone was found. Connect one and try again.",
      NotReadableError: "The microphone cannot be opened: another program may be using it. End that one and try again.",
    };
    throw new MicrophoneError(messages[error.name] ?? `The microphone cannot be opened: ${error.message}`);
  }
}

function stop(stream, context) {
  for (const track of stream.getTracks()) {
    track.onended = null;
    track.stop();
  }
  context.close();
}

/**
 * @param {Int16Array} samples
 * @returns {number} their level: 0 for silence (-60 dB and less) to 1 for the loudest that can be
 */
export function level(samples) {
  const power = samples.reduce((sum, sample) => sum + sample * sample, 0) / Math.max(1, samples.length);
  const decibels = 10 * Math.log10(power / 32768 ** 2);
  return Math.max(0, Math.min(1, decibels / 60 + 1));
}
