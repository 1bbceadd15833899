// Pictures of the next question: chosen, dropped or pasted; and one picture as the model sees it.

import { planOf } from "./api.js";
import { byId, drawn, icon, make, number } from "./dom.js";
import { closeOutside } from "./settings.js";

const TAKEN = ["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"];

/** A file as a picture: { name, url (data), width, height }. */
async function pictureOf(file) {
  if (file.type && !file.type.startsWith("image/")) throw new Error("no picture; take a PNG, JPEG or WebP file");
  const url = URL.createObjectURL(file);
  try {
    const image = new Image();
    image.src = url;
    try {
      await image.decode();
    } catch {
      throw new Error("no picture that this browser can read; take a PNG, JPEG or WebP file");
    }
    const { naturalWidth: width, naturalHeight: height } = image;
    // What the browser reads and the server does not (HEIC, AVIF, drawings) goes as PNG.
    const sent = TAKEN.includes(file.type) || !file.type ? file : await asPng(image, width, height);
    return { name: file.name || "pasted picture", url: await dataUrl(sent), width, height };
  } finally {
    URL.revokeObjectURL(url);
  }
}

async function asPng(image, width, height) {
  const canvas = make("canvas", { width, height });
  canvas.getContext("2d").drawImage(image, 0, 0);
  return new Promise((done, fail) => {
    canvas.toBlob((blob) => (blob ? done(blob) : fail(new Error("too large for this browser; take a smaller one"))), "image/png");
  });
}

function dataUrl(blob) {
  return new Promise((done, fail) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => fail(new Error("it cannot be read; choose it again"));
    reader.readAsDataURL(blob);
  });
}

export class Shelf {
  /**
   * @param limits of the server
   * @param held tells which pictures the conversation has already
   * @param complain shows a line
   */
  constructor(limits, held, complain) {
    this.limits = limits;
    this.held = held;
    this.complain = complain;
    this.pictures = [];
    const input = byId("files");
    byId("add").addEventListener("click", () => input.click());
    input.addEventListener("change", async () => {
      const files = [...input.files];
      input.value = "";
      await this.take(files);
    });
    document.addEventListener("paste", (event) => {
      const files = [...(event.clipboardData?.files ?? [])];
      if (!files.length) return;
      event.preventDefault();
      this.take(files);
    });
    this.takeDropped();
  }

  takeDropped() {
    let depth = 0;
    const veil = (on) => (byId("drop").hidden = !on);
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    document.addEventListener("dragenter", (event) => {
      if (hasFiles(event)) veil(++depth > 0);
    });
    document.addEventListener("dragleave", (event) => {
      if (hasFiles(event)) veil(--depth > 0);
    });
    document.addEventListener("dragover", (event) => event.preventDefault());
    document.addEventListener("drop", (event) => {
      event.preventDefault();
      veil((depth = 0) > 0);
      this.take([...(event.dataTransfer?.files ?? [])]);
    });
  }

  /** Take files one after the other, so that they stand in their order. */
  async take(files) {
    const wrong = [];
    for (const file of files) {
      try {
        const picture = await pictureOf(file);
        this.check(picture);
        this.pictures.push(picture);
      } catch (error) {
        wrong.push(`${file.name || "the pasted picture"}: ${error.message}`);
      }
    }
    this.complain(wrong.join("; "));
    this.show();
    byId("question").focus({ preventScroll: true });
  }

  check(picture) {
    const { images, pixels, bytes } = this.limits;
    const all = [...this.held(), ...this.pictures, picture];
    if (all.length > images) {
      throw new Error(`a conversation has room for ${images} ${images === 1 ? "picture" : "pictures"}; begin a new one`);
    }
    if (picture.width * picture.height > pixels) {
      throw new Error(`${picture.width} x ${picture.height} pixels, at most ${number(pixels)}; make it smaller`);
    }
    const size = all.reduce((sum, one) => sum + one.url.length, 0);
    if (size > bytes * 0.98) {
      throw new Error(`the pictures of a conversation may take ${number(bytes >> 20)} MiB together; make it smaller, or begin a new one`);
    }
  }

  /** Replace what lies here. */
  put(pictures) {
    this.pictures = [...pictures];
    this.show();
  }

  show() {
    const shelf = byId("shelf");
    shelf.hidden = !this.pictures.length;
    shelf.replaceChildren(...this.pictures.map((picture) => this.item(picture)));
  }

  item(picture) {
    const facts = make("small", {}, `${picture.width} x ${picture.height}`);
    const count = this.held().length + this.pictures.length;
    planOf(picture, count).then(
      ({ tokens }) => facts.replaceChildren(`${number(tokens)} tokens`),
      (error) => facts.replaceChildren(error.message),
    );
    const look = make(
      "button",
      { type: "button", class: "look", title: "As the model sees it", onclick: () => view(picture, count) },
      make("img", { src: picture.url, alt: picture.name }),
      facts,
    );
    const remove = make("button", { type: "button", class: "remove", "aria-label": `Remove ${picture.name}` }, icon("close"));
    remove.addEventListener("click", () => {
      this.pictures = this.pictures.filter((one) => one !== picture);
      this.show();
      byId("question").focus({ preventScroll: true });
    });
    return make("li", {}, look, remove);
  }
}

export function buildViewer() {
  const viewer = byId("viewer");
  byId("close-viewer").addEventListener("click", () => viewer.close());
  closeOutside(viewer);
}

/** Show a picture as the model sees it: its planes, with the borders of views and blocks, and padding hatched. */
export async function view(picture, images) {
  byId("viewer-title").textContent = picture.name;
  byId("viewer-text").textContent = `${picture.width} x ${picture.height} pixels`;
  byId("viewer-planes").replaceChildren(make("img", { class: "unseen", src: picture.url, alt: picture.name }));
  byId("viewer").showModal();
  try {
    const { planes, text } = await planOf(picture, images);
    byId("viewer-text").textContent = `${picture.width} x ${picture.height} pixels; the model sees it ${text}`;
    byId("viewer-planes").replaceChildren(...planes.map((plane) => planeOf(plane, picture)));
  } catch (error) {
    byId("viewer-text").textContent = error.message;
  }
}

function planeOf({ size: [width, height], picture: [left, top, across, down], views, blocks }, picture) {
  const image = make("img", { src: picture.url, alt: picture.name });
  Object.assign(image.style, { left: percent(left), top: percent(top), width: percent(across), height: percent(down) });
  const cuts = views.flatMap(([x, y, w, h]) =>
    ["cut", "cut over"].map((kind) => drawn("rect", { class: kind, x, y, width: w, height: h })),
  );
  const marks = drawn("svg", { viewBox: "0 0 1 1", preserveAspectRatio: "none", "aria-hidden": "true" }, grid(blocks), cuts);
  const box = make("div", {}, image, marks);
  box.style.aspectRatio = `${width} / ${height}`;
  box.style.width = `min(100%, ${((68 * width) / height).toFixed(1)}vh, ${Math.max(width, 480)}px)`;
  const count = views.length > 1 ? `${views.length} views, ` : "";
  const cells = blocks ? `, ${blocks[0]} x ${blocks[1]} blocks` : "";
  return make("figure", { class: "plane" }, make("figcaption", {}, `${count}${width} x ${height} pixels${cells}`), box);
}

function grid(blocks) {
  if (!blocks) return [];
  const [columns, rows] = blocks;
  const lines = [];
  for (let column = 1; column < columns; column += 1) lines.push(`M${column / columns} 0V1`);
  for (let row = 1; row < rows; row += 1) lines.push(`M0 ${row / rows}H1`);
  return [drawn("path", { class: "block", d: lines.join("") })];
}

const percent = (part) => `${(100 * part).toFixed(4)}%`;
