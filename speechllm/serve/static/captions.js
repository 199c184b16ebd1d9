import { Words } from "./words.js";

/** Captions as they come: what is being said in gray, what is completed in the color of text. */
export class Captions {
  /**
   * @param {HTMLElement} list
   * @param {HTMLElement} announcer is given the completed captions, for screen readers: partial ones would only disturb
   */
  constructor(list, announcer) {
    this.list = list;
    this.announcer = announcer;
    this.words = new Words(list);
    this.items = new Map(); // id -> <p>, of those that are not completed
  }

  get text() {
    return [...this.list.querySelectorAll("p:not(.partial, .failed)")].map((item) => item.textContent).join("\n");
  }

  /** More text of a caption, and what may still change after it. */
  extend(id, text, words, unstable) {
    const item = this.item(id);
    item.querySelector(".unstable")?.remove();
    item.append(this.words.show(text, words));
    if (unstable) {
      const span = document.createElement("span");
      span.className = "unstable";
      span.textContent = unstable;
      item.append(span);
    }
    this.follow(item);
  }

  complete(id, text, words) {
    const item = this.item(id);
    this.items.delete(id);
    if (text.trim() === "") {
      item.remove(); // silence
      return;
    }
    const focused = [...item.querySelectorAll(".word")].indexOf(document.activeElement);
    item.replaceChildren(this.words.show(text, words));
    item.querySelectorAll(".word")[focused]?.focus(); // a reader on a word stays on it
    item.classList.remove("partial");
    this.follow(item);
    const said = document.createElement("p");
    said.textContent = text;
    this.announcer.append(said);
    if (this.announcer.childElementCount > 20) this.announcer.firstElementChild.remove();
  }

  fail(id, message) {
    const item = this.item(id);
    this.items.delete(id);
    item.className = "failed";
    item.textContent = message;
  }

  /** Nothing more comes: what is certain stays. */
  settle() {
    for (const [id, item] of this.items) {
      item.querySelector(".unstable")?.remove();
      const words = [...item.querySelectorAll(".word")].map((element) => this.words.of.get(element));
      this.complete(id, item.textContent, words);
    }
  }

  /** Forget captions that are not completed. */
  dropPartial() {
    for (const item of this.items.values()) item.remove();
    this.items.clear();
  }

  clear() {
    this.list.replaceChildren(...this.items.values());
    this.announcer.replaceChildren();
  }

  item(id) {
    if (!this.items.has(id)) {
      const item = document.createElement("p");
      item.className = "partial";
      this.list.append(item);
      this.items.set(id, item);
    }
    return this.items.get(id);
  }

  /** The newest caption stays in view, unless the reader has scrolled up. */
  follow(item) {
    const { scrollHeight, scrollTop, clientHeight } = this.list;
    if (scrollHeight - scrollTop - clientHeight < 2 * item.offsetHeight + 40) this.list.scrollTop = scrollHeight;
  }
}
