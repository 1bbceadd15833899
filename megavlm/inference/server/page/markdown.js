// Markdown of answers as elements. Every text becomes a text node, so that no answer can bring markup or scripts, and
// pictures are never loaded: their source stands there as text.

import { make } from "./dom.js";

const INLINE = new RegExp(
  [
    "(?<code>`+)(?<inCode>[^\\n]*?[^`])\\k<code>(?!`)",
    "\\[(?<label>[^\\[\\]\\n]{1,500})\\]\\((?<url>https?://[^\\s()<>]+)\\)",
    "(?<bare>https?://[^\\s<>()\\[\\]]*[^\\s<>()\\[\\].,;:!?\"'])",
    "\\*\\*(?<strong>(?=\\S)[^*\\n]+?(?<=\\S))\\*\\*",
    "(?<![\\w*])\\*(?<em>(?=\\S)[^*\\n]+?(?<=\\S))\\*(?![\\w*])",
    "(?<![\\w_])_(?<under>(?=\\S)[^_\\n]+?(?<=\\S))_(?![\\w_])",
    "\\\\(?<escaped>[\\\\`*_{}\\[\\]()#+.!|-])",
  ].join("|"),
  "g",
);
const ITEM = /^(\s*)(?:([-*+])|(\d{1,4})[.)])\s+(.*)$/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const DEEPEST = 4;

/** The text of an answer without the tags that name and enclose boxes. */
export function withoutTags(answer) {
  return answer
    .replace(/<\|(?:box|quad)_start\|>/g, " ")
    .replace(/<\|(?:object_ref_(?:start|end)|(?:box|quad)_end|begin_of_box|end_of_box)\|>/g, "")
    .replace(/<(?:box|quad)>/g, " ")
    .replace(/<\/?ref>|<\/(?:box|quad)>/g, "")
    .replace(/(?:<loc\d{4}>)+/g, "");
}

/** Elements for a text. */
export function markdown(text) {
  return blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0);
}

function blocks(lines, depth) {
  const found = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const fence = /^\s{0,3}(`{3,}|~{3,})/.exec(line);
    if (!line.trim()) {
      at += 1;
    } else if (fence) {
      let end = at + 1;
      while (end < lines.length && !lines[end].trim().startsWith(fence[1])) end += 1;
      const code = make("code", {}, lines.slice(at + 1, end).join("\n"));
      found.push(make("pre", { tabindex: "0" }, code));
      at = end + 1;
    } else if (/^\s{0,3}#{1,6}\s/.test(line)) {
      const [, marks, words] = /^\s*(#+)\s+(.*?)\s*#*$/.exec(line);
      found.push(make(marks.length < 3 ? "h3" : "h4", {}, inline(words)));
      at += 1;
    } else if (/^\s{0,3}([-*_])(\s*\1){2,}\s*$/.test(line)) {
      found.push(make("hr"));
      at += 1;
    } else if (/^\s{0,3}>/.test(line) && depth < DEEPEST) {
      const end = until(lines, at, (one) => !/^\s{0,3}>/.test(one));
      const inner = lines.slice(at, end).map((one) => one.replace(/^\s*> ?/, ""));
      found.push(make("blockquote", {}, blocks(inner, depth + 1)));
      at = end;
    } else if (line.includes("|") && DIVIDER.test(lines[at + 1] ?? "") && lines[at + 1].includes("-")) {
      const end = until(lines, at + 2, (one) => !one.includes("|"));
      found.push(table(line, lines.slice(at + 2, end)));
      at = end;
    } else if (ITEM.test(line) && depth < DEEPEST) {
      const end = until(lines, at + 1, (one, i) => outside(lines, i));
      found.push(list(lines.slice(at, end), depth));
      at = end;
    } else {
      const end = until(lines, at + 1, (one) => !one.trim() || /^\s{0,3}(#{1,6}\s|>|`{3}|~{3})/.test(one) || ITEM.test(one));
      found.push(make("p", {}, broken(lines.slice(at, end))));
      at = end;
    }
  }
  return found;
}

function until(lines, from, ends) {
  let at = from;
  while (at < lines.length && !ends(lines[at], at)) at += 1;
  return at;
}

/** Whether a line is no part of the list in front of it. */
function outside(lines, at) {
  if (lines[at].trim()) return !ITEM.test(lines[at]) && !/^\s{2,}/.test(lines[at]) && !lines[at - 1].trim();
  const next = lines.slice(at).find((one) => one.trim()) ?? "";
  return !ITEM.test(next) && !/^\s{2,}/.test(next);
}

function list(lines, depth) {
  const [, indent, , start] = ITEM.exec(lines[0]);
  const items = [];
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found && found[1].length <= indent.length + 1) items.push([found[4]]);
    else items.at(-1).push(line.replace(new RegExp(`^\\s{0,${indent.length + 2}}`), ""));
  }
  const made = items.map(([first, ...rest]) => make("li", {}, inline(first), blocks(rest, depth + 1)));
  return start === undefined ? make("ul", {}, made) : make("ol", { start }, made);
}

function table(head, rows) {
  const cells = (row) => row.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const line = (row, name) => make("tr", {}, cells(row).map((cell) => make(name, {}, inline(cell))));
  const whole = make("table", {}, make("thead", {}, line(head, "th")), make("tbody", {}, rows.map((row) => line(row, "td"))));
  return make("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Table" }, whole);
}

function broken(lines) {
  return lines.flatMap((line, i) => (i ? [make("br"), ...inline(line)] : inline(line)));
}

function inline(text) {
  const found = [];
  let at = 0;
  for (const match of text.matchAll(INLINE)) {
    if (match.index > at) found.push(text.slice(at, match.index));
    found.push(styled(match.groups));
    at = match.index + match[0].length;
  }
  if (at < text.length) found.push(text.slice(at));
  return found;
}

function styled({ inCode, label, url, bare, strong, em, under, escaped }) {
  if (inCode !== undefined) return make("code", {}, inCode.trim() || inCode);
  const href = url ?? bare;
  if (href) return make("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, label ?? href);
  if (strong) return make("strong", {}, inline(strong));
  return escaped ?? make("em", {}, inline(em ?? under));
}
