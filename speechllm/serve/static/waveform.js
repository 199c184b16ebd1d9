const RATE = 8000; // enough to look at, and hours fit in memory
const PEAK = RATE / 100; // samples of a peak
const PIXELS_PER_SECOND = 130; // of the detail: room for the words of fluent speech

/** The waveform of a recording: all of it, and below it the part that is played, with its words. */
export class Waveform {
  /**
   * @param {HTMLCanvasElement} overview
   * @param {HTMLCanvasElement} detail
   * @param {(seconds: number) => void} onSeek a place was clicked
   */
  constructor(overview, detail, onSeek) {
    this.overview = overview;
    this.detail = detail;
    this.words = [];
    this.peaks = [];
    this.seconds = this.at = 0;
    overview.addEventListener("click", ({ offsetX }) => onSeek((offsetX / overview.clientWidth) * this.seconds));
    detail.addEventListener("click", ({ offsetX }) => {
      const seconds = this.from + offsetX / this.scale;
      const word = this.words.find(({ start, end }) => start <= seconds && seconds < end);
      onSeek(word ? word.start : seconds);
    });
    new ResizeObserver(() => this.draw()).observe(overview);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /**
   * @param {File} file
   * @throws {DOMException} this browser cannot read its format
   */
  async load(file) {
    const audio = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await file.arrayBuffer());
    const samples = audio.getChannelData(0);
    this.peaks = Float32Array.from({ length: Math.ceil(samples.length / PEAK) }, (_, i) =>
      samples.subarray(i * PEAK, (i + 1) * PEAK).reduce((peak, sample) => Math.max(peak, Math.abs(sample)), 0),
    );
    this.loudest = this.peaks.reduce((a, b) => Math.max(a, b), 0.01);
    this.seconds = audio.duration;
    this.draw();
  }

  /** Show this place, in seconds; where playing leaves the detail, the page is turned. */
  show(seconds) {
    this.at = seconds;
    this.draw();
  }

  get scale() {
    return Math.max(PIXELS_PER_SECOND, this.detail.clientWidth / this.seconds);
  }

  /** The second at the left of the detail. */
  get from() {
    const page = this.detail.clientWidth / this.scale;
    return Math.min(Math.floor(this.at / page) * page, Math.max(0, this.seconds - page));
  }

  draw() {
    if (this.seconds === 0 || this.overview.clientWidth === 0) return;
    const style = getComputedStyle(this.overview);
    const color = (name) => style.getPropertyValue(`--${name}`);
    const { from, scale } = this;
    const width = this.detail.clientWidth;

    let pen = clean(this.overview);
    const whole = width / this.seconds;
    pen.fillStyle = color("hover");
    pen.fillRect(from * whole, 0, (width / scale) * whole, this.overview.clientHeight);
    pen.fillStyle = color("wave");
    this.drawPeaks(pen, 0, whole, width, this.overview.clientHeight);
    pen.fillStyle = color("recording");
    pen.fillRect(this.at * whole - 1, 0, 2, this.overview.clientHeight);

    pen = clean(this.detail);
    const height = this.detail.clientHeight;
    pen.fillStyle = color("wave");
    this.drawPeaks(pen, from, scale, width, height - 48);
    this.drawWords(pen, from, scale, width, height, color);
    pen.fillStyle = color("recording");
    pen.fillRect((this.at - from) * scale - 1, 0, 2, height - 48);
  }

  drawPeaks(pen, from, scale, width, height) {
    for (let x = 0; x < width; x++) {
      const first = Math.floor(((from + x / scale) * RATE) / PEAK);
      const last = Math.max(first + 1, Math.floor(((from + (x + 1) / scale) * RATE) / PEAK));
      let peak = 0;
      for (let i = first; i < last && i < this.peaks.length; i++) peak = Math.max(peak, this.peaks[i]);
      const size = Math.max(1, (peak / this.loudest) * (height - 4));
      pen.fillRect(x, (height - size) / 2, 1, size);
    }
  }

  /** The words below their sound; one that has no room in the first line is in the second. */
  drawWords(pen, from, scale, width, height, color) {
    const { fontFamily } = getComputedStyle(document.documentElement);
    pen.font = `14px ${fontFamily}`;
    pen.textBaseline = "middle";
    let firstLineEnd = -Infinity;
    for (const { word, start, end } of this.words) {
      const [left, right] = [(start - from) * scale, (end - from) * scale];
      if (right < 0 || left > width) continue;
      const hasRoom = left > firstLineEnd;
      if (hasRoom) firstLineEnd = left + pen.measureText(`${word} `).width;
      const isPlayed = start <= this.at && this.at < end;
      pen.fillStyle = color(isPlayed ? "accent" : "line");
      pen.fillRect(left, height - 46, Math.max(2, right - left - 1), isPlayed ? 4 : 2);
      pen.fillStyle = color(isPlayed ? "accent" : "text");
      pen.fillText(word, left, height - (hasRoom ? 30 : 10));
    }
  }
}

/** A pen for an empty canvas that has the screen's pixels. */
function clean(canvas) {
  const ratio = window.devicePixelRatio;
  canvas.width = canvas.clientWidth * ratio;
  canvas.height = canvas.clientHeight * ratio;
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  return pen;
}
