// Boxes of an answer over the picture that they are on.

import { boxesOf } from "./api.js";
import { drawn, make } from "./dom.js";

const COLOURS = ["#c92a2a", "#1864ab", "#2b7a3d", "#a04a00", "#7048b0", "#0b7285"]; // white on them: 4.5:1
const MOST_NAMES = 12;

/** A figure with the boxes of an answer, or null where it has none; `pictures` are those that the question shows. */
export async function figureOf(answer, pictures, images) {
  // An answer speaks of the picture that was shown last, unless one says otherwise.
  const last = pictures.length - 1;
  const boxes = await boxesOf(answer, pictures[last], images);
  if (!boxes.length) return null;
  const figure = make("figure", { class: "found" });
  figure.append(...shown(pictures[last], boxes));
  if (pictures.length > 1) figure.append(chooser(figure, answer, pictures, images));
  return figure;
}

function chooser(figure, answer, pictures, images) {
  const buttons = pictures.map((picture, i) => {
    const pressed = String(i === pictures.length - 1);
    return make("button", { type: "button", "aria-pressed": pressed, title: picture.name }, `On picture ${i + 1}`);
  });
  const row = make("div", { class: "legend", role: "group", "aria-label": "Draw the boxes on" }, buttons);
  buttons.forEach((button, i) =>
    button.addEventListener("click", async () => {
      const boxes = await boxesOf(answer, pictures[i], images).catch(() => null);
      if (boxes === null) return; // what is shown stays
      for (const one of buttons) one.setAttribute("aria-pressed", String(one === button));
      figure.replaceChildren(...shown(pictures[i], boxes), row);
    }),
  );
  return row;
}

function shown(picture, boxes) {
  const marks = boxes.map(({ name, sides: [left, top, right, bottom] }, i) => {
    const place = { x: left, y: top, width: right - left, height: bottom - top };
    const colour = COLOURS[i % COLOURS.length];
    const title = drawn("title", {}, name ?? `box ${i + 1}`);
    return drawn("g", {}, title, drawn("rect", { class: "rim", ...place }), drawn("rect", { stroke: colour, ...place }));
  });
  const image = make("img", { src: picture.url, alt: `${picture.name} with the answer's boxes` });
  const svg = drawn("svg", { viewBox: "0 0 1 1", preserveAspectRatio: "none", "aria-hidden": "true" }, marks);
  const names = boxes.length > MOST_NAMES ? [] : boxes.map((box, i) => tag(box, COLOURS[i % COLOURS.length]));
  const chips = boxes.map((box, i) => make("li", {}, chip(box, i, marks[i])));
  return [make("div", { class: "stage" }, image, svg, names), make("ul", { class: "legend", "aria-label": "Boxes" }, chips)];
}

function tag({ name, sides: [left, top, right] }, colour) {
  if (!name) return [];
  const label = make("span", { class: "tag", "aria-hidden": "true" }, name);
  label.style.background = colour;
  // Names grow inwards, and stand above their box where there is room.
  if (left + right < 1) label.style.left = `${100 * left}%`;
  else label.style.right = `${100 * (1 - right)}%`;
  label.style.top = `${100 * top}%`;
  if (top > 0.08) label.classList.add("above");
  return [label];
}

function chip({ name, sides }, i, mark) {
  const dot = make("span", { class: "dot" });
  dot.style.background = COLOURS[i % COLOURS.length];
  const [left, top, right, bottom] = sides.map((side) => Math.round(100 * side));
  const title = `from ${left} % / ${top} % to ${right} % / ${bottom} %`;
  const button = make("button", { type: "button", title }, dot, name ?? `box ${i + 1}`);
  const light = (on) => () => mark.classList.toggle("on", on);
  for (const event of ["mouseenter", "focus"]) button.addEventListener(event, light(true));
  for (const event of ["mouseleave", "blur"]) button.addEventListener(event, light(false));
  return button;
}
