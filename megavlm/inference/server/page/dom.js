// Elements without markup: whatever text goes in here comes out as text.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes (properties where they are functions or booleans) and children (elements or texts). */
export function make(name, attributes = {}, ...children) {
  return filled(document.createElement(name), attributes, children);
}

export function drawn(name, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, name), attributes, children);
}

function filled(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function" || typeof value === "boolean") element[key] = value;
    else if (value !== undefined && value !== null) element.setAttribute(key, value);
  }
  element.append(...children.flat(2));
  return element;
}

export function icon(name) {
  return drawn("svg", { class: "icon", "aria-hidden": "true" }, drawn("use", { href: `#icon-${name}` }));
}

export const byId = (id) => document.getElementById(id);

export function number(value) {
  return value.toLocaleString("en");
}
