// Settings, kept in this browser, and the colour scheme. On wide windows the panel stands beside the conversation.

import { byId, make, number } from "./dom.js";

const KEY = "megavlm.settings";
const FIELDS = ["temperature", "top_p", "length", "system"];
const wide = matchMedia("(min-width: 1120px)");

export class Settings {
  constructor(told) {
    this.told = told;
    byId("system-field").hidden = !told.system;
    byId("length").max = told.context;
    byId("system").placeholder = told.defaults.system || "none";
    this.show(this.saved());
    for (const field of FIELDS) byId(field).addEventListener("input", () => this.changed());
    byId("length").addEventListener("change", () => (byId("length").value = this.now.length));
    byId("settings").addEventListener("submit", (event) => event.preventDefault());
    byId("reset").addEventListener("click", () => {
      this.show({ ...told.defaults, system: "" });
      write(KEY, null);
    });
  }

  /** What the next question is asked with. */
  get now() {
    const { defaults, context } = this.told;
    const length = Math.round(Number(byId("length").value));
    return {
      temperature: Number(byId("temperature").value),
      top_p: Number(byId("top_p").value),
      length: length >= 1 ? Math.min(length, context) : defaults.length,
      system: this.told.system ? byId("system").value.trim() : "",
    };
  }

  saved() {
    const { defaults, context } = this.told;
    const kept = read(KEY);
    const within = (name, low, high) => {
      const value = kept[name];
      return typeof value === "number" && value >= low && value <= high ? value : defaults[name];
    };
    return {
      temperature: within("temperature", 0, 2),
      top_p: within("top_p", 0, 1),
      length: within("length", 1, context),
      system: typeof kept.system === "string" ? kept.system : "",
    };
  }

  show(values) {
    for (const field of FIELDS) byId(field).value = values[field];
    this.say();
  }

  changed() {
    this.say();
    const { defaults } = this.told;
    const now = this.now;
    // What is as the server has it is not kept, so that a server with other defaults is heard.
    const own = Object.entries(now).filter(([name, value]) => value !== (name === "system" ? "" : defaults[name]));
    write(KEY, own.length ? Object.fromEntries(own) : null);
  }

  say() {
    byId("temperature-said").value = this.now.temperature.toFixed(1);
    byId("top_p-said").value = this.now.top_p.toFixed(2);
  }
}

export function buildPanel(told) {
  const facts = [["Name", told.name], ["Family", told.family ?? "trained here"]];
  facts.push(...told.parts.map(({ part, text }) => [part, text]));
  facts.push(["Context", `${number(told.context)} tokens`]);
  facts.push(["Pictures", `up to ${told.limits.images}, each below ${number(Math.floor(told.limits.pixels / 1e4) / 100)} megapixels`]);
  byId("facts").append(...facts.flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)]));
  const panel = byId("panel");
  const arrange = () => {
    if (panel.open) panel.close();
    // As an attribute: show() would take the focus from the question.
    panel.toggleAttribute("open", wide.matches);
  };
  wide.addEventListener("change", arrange);
  arrange();
  byId("open-panel").addEventListener("click", () => panel.showModal());
  byId("close-panel").addEventListener("click", () => panel.close());
  closeOutside(panel);
}

/** A click beside a dialog closes it. */
export function closeOutside(dialog) {
  dialog.addEventListener("click", (event) => {
    if (event.target !== dialog || !dialog.matches(":modal")) return;
    const { left, right, top, bottom } = dialog.getBoundingClientRect();
    const inside = event.clientX >= left && event.clientX <= right && event.clientY >= top && event.clientY <= bottom;
    if (!inside) dialog.close();
  });
}

export function buildTheme() {
  const button = byId("theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const now = () => document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
  const say = () => button.setAttribute("aria-label", `Use the ${now() === "dark" ? "light" : "dark"} scheme`);
  button.addEventListener("click", () => {
    const next = now() === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = next;
    try {
      localStorage.setItem("megavlm.theme", next);
    } catch {
      // For this visit only, then.
    }
    say();
  });
  dark.addEventListener("change", say);
  say();
}

function read(key) {
  try {
    const found = JSON.parse(localStorage.getItem(key) ?? "{}");
    return found && typeof found === "object" ? found : {};
  } catch {
    return {};
  }
}

function write(key, value) {
  try {
    if (value === null) localStorage.removeItem(key);
    else localStorage.setItem(key, JSON.stringify(value));
  } catch {
    // Storage is switched off or full: the settings hold for this visit.
  }
}
