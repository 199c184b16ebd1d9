const DOUBTFUL = 0.5; // words of a smaller confidence are underlined

/**
 * Words that say their confidence and times when the pointer or the focus is on them. The words of a transcript are one
 * stop of the Tab key; the arrow keys, Home and End move among them.
 */
export class Words {
  /**
   * @param {HTMLElement} container of all the words
   * @param {(word: object) => void} [onChoose] a word was clicked, or Enter was pressed on it
   */
  constructor(container, onChoose) {
    this.container = container;
    this.onChoose = onChoose;
    this.of = new WeakMap(); // element -> word
    container.classList.toggle("choosable", Boolean(onChoose));
    container.addEventListener("keydown", (event) => this.keyPressed(event));
    container.addEventListener("click", ({ target }) => this.choose(target));
    for (const name of ["pointerover", "focusin"]) {
      container.addEventListener(name, ({ target }) => this.of.has(target) && showNote(target, this.of.get(target)));
    }
    for (const name of ["pointerout", "focusout"]) container.addEventListener(name, hideNote);
  }

  /**
   * A text in which the words can be reached; its `textContent` is the text, whatever the words are.
   *
   * @param {string} text
   * @param {object[]} words of it, in order: `word`, `start`, `end`, and where known `confidence`
   * @returns {DocumentFragment}
   */
  show(text, words) {
    const fragment = new DocumentFragment();
    let done = 0;
    for (const word of words) {
      const at = text.indexOf(word.word, done);
      if (at < 0 || word.word === "") continue; // the text is normalized, for example: it counts
      fragment.append(text.slice(done, at), this.element(word));
      done = at + word.word.length;
    }
    fragment.append(text.slice(done));
    return fragment;
  }

  element(word) {
    const element = document.createElement("span");
    element.className = "word";
    element.textContent = word.word;
    element.tabIndex = -1;
    if (this.onChoose) element.setAttribute("role", "button");
    if (word.confidence < DOUBTFUL) element.classList.add("doubtful");
    this.of.set(element, word);
    word.element = element;
    return element;
  }

  choose(target) {
    if (this.onChoose && this.of.has(target)) this.onChoose(this.of.get(target));
  }

  keyPressed(event) {
    const { key, target } = event;
    if (event.altKey || event.ctrlKey || event.metaKey) return; // the browser's own keys
    if (key === "Escape") hideNote();
    if ((key === "Enter" || key === " ") && this.onChoose && this.of.has(target)) {
      event.preventDefault();
      this.choose(target);
    }
    const all = [...this.container.querySelectorAll(".word")];
    const at = all.indexOf(target);
    const to = { ArrowRight: at + 1, ArrowLeft: at < 0 ? all.length - 1 : at - 1, Home: 0, End: all.length - 1 }[key];
    if (to === undefined || !all[to]) return;
    event.preventDefault();
    all[to].focus();
  }
}

/** @returns {string} for example "98 % certain · 0.32 to 0.76 s" */
export function describe({ confidence, start, end }) {
  const certain = confidence === undefined || confidence === null ? [] : [`${Math.round(100 * confidence)} % certain`];
  return [...certain, `${start.toFixed(2)} to ${end.toFixed(2)} s`].join(" · ");
}

let noted = null; // the element whose note is shown

function showNote(element, word) {
  hideNote();
  noted = element;
  const note = document.getElementById("word-note");
  note.textContent = describe(word);
  note.hidden = false;
  element.setAttribute("aria-describedby", note.id);
  placeNote();
}

/** Above the word, or below it where there is no room. */
function placeNote() {
  const note = document.getElementById("word-note");
  const at = noted.getClientRects()[0];
  const left = Math.min(at.left, document.documentElement.clientWidth - note.offsetWidth - 8);
  note.style.left = `${Math.max(8, left)}px`;
  note.style.top = `${at.top > note.offsetHeight + 8 ? at.top - note.offsetHeight - 4 : at.bottom + 4}px`;
}

function hideNote() {
  document.getElementById("word-note").hidden = true;
  noted?.removeAttribute("aria-describedby");
  noted = null;
}

// A word that the keys go to may be scrolled into view after its note is shown.
document.addEventListener("scroll", () => noted?.isConnected && placeNote(), { capture: true, passive: true });
