/**
 * Changes the sampling rate of audio that comes block by block, with a windowed-sinc filter: what the lower rate cannot
 * hold is taken out, not folded into the speech. The blocks' sizes have no influence.
 */
export class Resampler {
  /**
   * @param {number} from samples per second that come in
   * @param {number} to samples per second that go out
   * @param {number} zeros zero crossings of the filter on each side: more make a sharper cut
   */
  constructor(from, to, zeros = 16) {
    const divisor = greatestCommonDivisor(from, to);
    this.up = to / divisor;
    this.down = from / divisor;
    const cutoff = 0.94 * Math.min(1, to / from); // of the input's Nyquist frequency
    this.half = Math.ceil(zeros / cutoff); // input samples on each side of an output sample
    // Output n lies at n * down / up in the input: between two samples at one of `up` places, each with its own filter.
    this.filters = Array.from({ length: this.up }, (_, phase) => this.filter(phase / this.up, cutoff));
    this.input = new Float32Array(this.half); // silence before the first sample
    this.next = this.half * this.up; // place of the next output in `input`, in parts of 1 / up
  }

  filter(offset, cutoff) {
    const taps = Float32Array.from({ length: 2 * this.half }, (_, i) => {
      const x = i - this.half + 1 - offset;
      const sinc = x === 0 ? 1 : Math.sin(Math.PI * cutoff * x) / (Math.PI * cutoff * x);
      return Math.abs(x) < this.half ? sinc * Math.cos((Math.PI * x) / (2 * this.half)) ** 2 : 0;
    });
    const sum = taps.reduce((a, b) => a + b);
    return taps.map((tap) => tap / sum); // a constant stays what it is
  }

  /**
   * @param {Float32Array} block
   * @returns {Float32Array} all samples that can be computed by now
   */
  push(block) {
    const input = new Float32Array(this.input.length + block.length);
    input.set(this.input);
    input.set(block, this.input.length);
    const output = [];
    for (; Math.floor(this.next / this.up) + this.half < input.length; this.next += this.down) {
      const first = Math.floor(this.next / this.up) - this.half + 1;
      const taps = this.filters[this.next % this.up];
      let sum = 0;
      for (let i = 0; i < taps.length; i++) sum += taps[i] * input[first + i];
      output.push(sum);
    }
    const used = Math.floor(this.next / this.up) - this.half + 1;
    this.input = input.slice(used);
    this.next -= used * this.up;
    return Float32Array.from(output);
  }
}

function greatestCommonDivisor(a, b) {
  return b === 0 ? a : greatestCommonDivisor(b, a % b);
}
