// The page: puts the parts together, and asks.

import { about, exampleFile, explained } from "./api.js";
import { figureOf } from "./boxes.js";
import { byId, icon, make, number } from "./dom.js";
import { markdown, withoutTags } from "./markdown.js";
import { Shelf, buildViewer, view } from "./pictures.js";
import { Settings, buildPanel, buildTheme } from "./settings.js";
import { Talk, unasked } from "./talk.js";

const SENTENCE = /[.!?:;\n\u3002\uff01\uff1f](?=\s|$)/g;

class Page {
  constructor(told) {
    this.told = told;
    this.talk = new Talk(told);
    this.settings = new Settings(told);
    this.shelf = new Shelf(told.limits, () => this.talk.pictures, (line) => this.complain(line));
    this.asking = null;
    this.question = byId("question");
    this.welcome();
    this.listen();
    this.busy(false);
  }

  welcome() {
    const { told } = this;
    document.title = `${told.name} - megavlm`;
    byId("name").textContent = told.name;
    byId("family").textContent = `${told.name}: ${told.family ?? told.parts.slice(0, 3).map(({ text }) => text).join(", ")}`;
    const facts = told.abilities.map(({ name, text }) => make("div", {}, make("dt", {}, name), make("dd", {}, text)));
    byId("abilities").append(...facts);
    byId("examples").append(...told.examples.map((one) => make("li", one.pictures.length > 1 ? { class: "pair" } : {}, this.example(one))));
  }

  example({ title, question, pictures }) {
    const shots = pictures.map((name) => make("img", { src: `page/${name}`, alt: "", loading: "lazy" }));
    const button = make("button", { type: "button", class: "example" });
    button.append(make("div", { class: "shots" }, shots), make("b", {}, title), make("span", {}, question));
    button.addEventListener("click", async () => {
      try {
        const files = await Promise.all(pictures.map(exampleFile));
        this.shelf.put([]);
        await this.shelf.take(files);
        if (this.shelf.pictures.length !== files.length) return;
        this.question.value = question;
        await this.send();
      } catch (error) {
        this.complain(explained(error));
      }
    });
    return button;
  }

  listen() {
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    this.question.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send();
    });
    this.question.addEventListener("input", () => this.fit());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.asking && !document.querySelector("dialog:modal")) this.asking.abort();
    });
    byId("stop").addEventListener("click", () => this.asking?.abort());
    byId("clear").addEventListener("click", () => this.clear());
    if (matchMedia("(hover: hover)").matches) this.question.focus();
  }

  /** Let the entry be as tall as its text, where the style sheet alone cannot. */
  fit() {
    if (CSS.supports("field-sizing", "content")) return;
    this.question.style.height = "auto";
    this.question.style.height = `${this.question.scrollHeight}px`;
  }

  complain(line) {
    byId("problem").textContent = line;
    byId("problem").hidden = !line;
  }

  busy(on) {
    byId("send").hidden = on;
    byId("stop").hidden = !on;
    byId("clear").hidden = !this.talk.turns.length && !on;
    byId("welcome").hidden = this.talk.turns.length > 0 || on;
    for (const button of byId("talk").querySelectorAll("[data-retry]")) button.hidden = on || button.dataset.retry !== "last";
  }

  clear() {
    this.asking?.abort("cleared");
    this.asking = null;
    this.talk.clear();
    this.shelf.put([]);
    this.question.value = "";
    this.complain("");
    byId("talk").replaceChildren();
    byId("spoken").replaceChildren();
    this.busy(false);
    this.fit();
    this.question.focus();
  }

  async send() {
    const text = this.question.value.trim();
    const pictures = this.shelf.pictures;
    if (this.asking) return;
    const why = text ? unasked(text, pictures) : pictures.length ? "Write a question about the picture." : "";
    this.complain(why ?? "");
    if (!text || why) return this.question.focus();
    this.question.value = "";
    this.shelf.put([]);
    this.fit();
    const asked = this.asked(text, pictures);
    byId("talk").append(asked);
    const answered = await this.answer({ text, pictures });
    if (answered !== "refused") return;
    // Nothing was said: the question goes back to where it can be changed.
    asked.remove();
    if (!this.question.value) {
      this.question.value = text;
      this.shelf.put(pictures);
    }
    this.busy(false);
    this.question.focus();
  }

  asked(text, pictures) {
    const images = this.talk.pictures.length + pictures.length;
    const shots = pictures.map((picture, i) => {
      const image = make("img", { src: picture.url, alt: `Picture ${i + 1}: ${picture.name}` });
      return make("li", {}, make("button", { type: "button", title: "As the model sees it", onclick: () => view(picture, images) }, image));
    });
    const list = shots.length ? [make("ul", { class: "shown", "aria-label": "Pictures" }, shots)] : [];
    return make("article", { class: "asked", "aria-label": "You" }, list, make("p", { class: "words" }, text));
  }

  /** Ask, and show the answer as it comes. Returns "refused" where the server took no such question. */
  async answer(turn) {
    const control = new AbortController();
    this.asking = control;
    const shown = new Answer(this.told.name, () => this.retry(turn, shown));
    for (const button of byId("talk").querySelectorAll("[data-retry]")) button.dataset.retry = "";
    byId("talk").append(shown.element);
    this.busy(true);
    shown.element.scrollIntoView({ block: "end" });
    const began = performance.now();
    let error = null;
    let end = null;
    try {
      end = await this.talk.ask(turn, this.settings.now, control.signal, (piece) => shown.add(piece), (count) => shown.forgot(count));
    } catch (failed) {
      error = failed;
    }
    if (control.signal.reason === "cleared") return "cleared"; // and another may be asking by now
    this.asking = null;
    const stopped = control.signal.aborted;
    if (error && !stopped && !shown.text) {
      shown.element.remove();
      this.complain(explained(error));
      this.busy(false);
      return "refused";
    }
    this.talk.turns.push({ ...turn, answer: shown.text });
    shown.end(end, stopped, stopped ? null : error, (performance.now() - began) / 1000);
    this.busy(false);
    const pictures = this.talk.shown;
    if (shown.text && pictures.length) await shown.draw(pictures, this.talk.pictures.length);
    return "answered";
  }

  async retry(turn, shown) {
    if (this.asking) return;
    this.complain("");
    this.talk.turns.pop();
    shown.element.remove();
    const answered = await this.answer(turn);
    if (answered !== "refused") return this.question.focus();
    // The question stands there still; what was said of it before counts again.
    shown.again.dataset.retry = "last";
    this.talk.turns.push({ ...turn, answer: shown.text });
    byId("talk").append(shown.element);
    this.busy(false);
  }
}

/** An answer on the page. */
class Answer {
  constructor(name, retry) {
    this.text = "";
    this.spoken = 0;
    this.body = make("div", { class: "text" });
    this.copy = make("button", { type: "button", class: "quiet", onclick: () => this.copied() }, "Copy");
    this.again = make("button", { type: "button", class: "quiet", "data-retry": "last", onclick: retry }, "Try again");
    this.facts = make("p");
    this.after = make("div", { class: "after", hidden: true }, this.copy, this.again, this.facts);
    this.element = make("article", { class: "answer busy", "aria-label": name }, this.body, this.after);
    byId("spoken").replaceChildren();
  }

  add(piece) {
    this.text += piece;
    if (!this.waits) this.waits = requestAnimationFrame(() => this.draws());
  }

  draws() {
    this.waits = 0;
    const below = document.documentElement.scrollHeight - innerHeight - scrollY < 120;
    this.body.replaceChildren(...markdown(withoutTags(this.text)));
    if (below) scrollTo(0, document.documentElement.scrollHeight);
    this.speak(false);
  }

  /** Tell a screen reader whole sentences, each once, instead of every change of the text. */
  speak(all) {
    const left = this.text.slice(this.spoken);
    const end = all ? left.length : Math.max(-1, ...[...left.matchAll(SENTENCE)].map((match) => match.index)) + 1;
    if (!end) return;
    this.spoken += end;
    const said = withoutTags(left.slice(0, end)).trim();
    if (said) byId("spoken").append(make("p", {}, said));
  }

  forgot(count) {
    this.notice?.remove();
    const what = count === 1 ? "The oldest question" : `The ${count} oldest questions`;
    this.notice = make("p", { class: "notice" }, `${what} no longer fits the context and was left out.`);
    if (count > 1) this.notice.textContent = `${what} no longer fit the context and were left out.`;
    this.element.prepend(this.notice);
  }

  end(end, stopped, error, seconds) {
    cancelAnimationFrame(this.waits);
    this.draws();
    this.speak(true);
    this.element.classList.remove("busy");
    if (!this.text.trim()) this.body.replaceChildren(make("p", { class: "help" }, stopped ? "(stopped before a word)" : "(an empty answer)"));
    const facts = [];
    const tokens = end?.usage?.completion_tokens;
    if (tokens) facts.push(`${number(tokens)} tokens`, `${(tokens / Math.max(seconds, 0.001)).toFixed(1)} a second`);
    if (stopped) facts.push("stopped");
    if (end?.finish === "length") facts.push("cut off at the longest answer; see Settings");
    this.facts.textContent = facts.join(", ");
    this.copy.hidden = !this.text;
    this.after.hidden = false;
    if (error) this.after.before(make("p", { class: "problem", role: "alert" }, explained(error)));
  }

  async draw(pictures, images) {
    try {
      const figure = await figureOf(this.text, pictures, images);
      if (figure) this.after.before(figure);
    } catch (error) {
      this.after.before(make("p", { class: "problem", role: "alert" }, explained(error)));
    }
  }

  async copied() {
    let done = "Copied";
    try {
      await navigator.clipboard.writeText(this.text);
    } catch {
      done = byHand(this.text) ? "Copied" : "Select the text to copy it";
    }
    this.copy.textContent = done;
    setTimeout(() => (this.copy.textContent = "Copy"), 2000);
  }
}

/** Copy where the page has no clipboard: it was not opened from this machine, nor through https. */
function byHand(text) {
  const field = make("textarea", { class: "unseen", "aria-hidden": "true" });
  field.value = text;
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  return done;
}

buildTheme();
buildViewer();
about().then(
  (told) => {
    buildPanel(told);
    new Page(told);
  },
  (error) => {
    byId("problem").textContent = explained(error);
    byId("problem").hidden = false;
  },
);
