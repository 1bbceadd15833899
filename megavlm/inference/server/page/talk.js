// A conversation: what was asked and answered, and what of it is sent again.

import { complete } from "./api.js";

const MARK = "<img>";

export class Talk {
  /** @param told what the server says of the model */
  constructor(told) {
    this.told = told;
    this.clear();
  }

  clear() {
    /** Exchanges: { text, pictures, answer }. */
    this.turns = [];
  }

  /** Pictures of all exchanges that are sent again. */
  get pictures() {
    return this.remembered(this.turns).flatMap((turn) => turn.pictures);
  }

  /** Pictures that the last question speaks of: its own, or else the last ones shown before it. */
  get shown() {
    return this.turns.findLast((turn) => turn.pictures.length)?.pictures ?? [];
  }

  remembered(turns) {
    const most = this.told.exchanges;
    // The next question is one of them.
    return most === null ? turns : turns.slice(Math.max(0, turns.length - most + 1));
  }

  /**
   * Ask a question behind the others; oldest exchanges that no longer fit are left out.
   * @param turn { text, pictures }
   * @param settings of the answer
   * @param news gets each new piece of text
   * @param forgot is told how many exchanges were left out
   */
  async ask(turn, settings, signal, news, forgot) {
    const before = this.remembered(this.turns);
    for (let from = 0; ; from += 1) {
      try {
        return await complete(this.request([...before.slice(from), turn], settings), signal, news);
      } catch (error) {
        if (error.code !== "context_length_exceeded" || from >= before.length) throw error;
        forgot(from + 1);
      }
    }
  }

  request(turns, settings) {
    const { temperature, top_p, length, system } = settings;
    const messages = system ? [{ role: "system", content: system }] : [];
    for (const { text, pictures, answer } of turns) {
      messages.push({ role: "user", content: parts(text, pictures) });
      if (answer !== undefined) messages.push({ role: "assistant", content: answer });
    }
    return { model: this.told.name, messages, temperature, top_p, max_completion_tokens: length };
  }
}

/** Why a question cannot be asked, or null. */
export function unasked(text, pictures) {
  const marks = text.split(MARK).length - 1;
  if (!marks || marks === pictures.length) return null;
  return `The question has ${marks} <img>, and ${pictures.length} pictures are given; make them equally many, or leave <img> out.`;
}

/** A question as parts: pictures stand where <img> is written, or else in front. */
function parts(text, pictures) {
  const images = pictures.map(({ url }) => ({ type: "image_url", image_url: { url } }));
  const pieces = text.split(MARK);
  if (pieces.length === 1) return [...images, { type: "text", text }];
  const found = pieces.flatMap((piece, i) => [...(piece ? [{ type: "text", text: piece }] : []), images[i] ?? []]);
  return found.flat();
}
