// The server's routes, and what its errors mean to people. URLs are relative: the page may stand behind a proxy's folder.

export class Refused extends Error {
  constructor(message, code, status) {
    super(message);
    this.code = code;
    this.status = status;
  }
}

const REMEDIES = {
  context_length_exceeded: "shorten the question, take fewer pictures, or lower the longest answer in Settings",
  too_many_images: "begin a new conversation",
  request_too_large: "remove a picture, or begin a new conversation",
  invalid_image: "take another picture",
  model_failed: "try again",
  too_many_connections: "try again in a moment",
};
const GONE = "The server does not answer; see whether megavlm serve still runs, then try again.";

/** One line that says what is wrong and what to do. */
export function explained(error) {
  if (!(error instanceof Refused)) return `The page failed: ${error.message}; load it again.`;
  const remedy = REMEDIES[error.code];
  const line = remedy ? `${error.message}; ${remedy}` : error.message;
  return line.replace(/\s*\n\s*/g, " ");
}

export async function about() {
  return body(await reached(fetch("page/model.json")));
}

export async function exampleFile(name) {
  const response = await reached(fetch(`page/${name}`));
  if (!response.ok) await body(response);
  return new File([await response.blob()], name, { type: "image/png" });
}

export async function planOf(picture, images) {
  const asked = new URLSearchParams({ width: picture.width, height: picture.height, images });
  return body(await reached(fetch(`page/plan?${asked}`)));
}

export async function boxesOf(text, picture, images) {
  const { width, height } = picture;
  return (await body(await posted("page/boxes", { text, width, height, images }))).boxes;
}

/**
 * Ask, and call `news` with each new piece of text.
 * @returns what ended the answer, and the tokens of prompt and answer
 */
export async function complete(request, signal, news) {
  const options = { stream: true, stream_options: { include_usage: true } };
  const response = await posted("v1/chat/completions", { ...request, ...options }, signal);
  if (!response.ok) await body(response);
  let finish = null;
  let usage = null;
  for await (const event of events(response)) {
    if (event.error) throw new Refused(event.error.message, event.error.code, 500);
    usage = event.usage ?? usage;
    const choice = event.choices[0];
    if (choice?.delta.content) news(choice.delta.content);
    finish = choice?.finish_reason ?? finish;
  }
  if (finish === null) throw new Refused(GONE);
  return { finish, usage };
}

function posted(url, json, signal) {
  const headers = { "Content-Type": "application/json" };
  return reached(fetch(url, { method: "POST", headers, body: JSON.stringify(json), signal }));
}

/** What came of a request; browsers say TypeError where the server was not reached, or went away. */
async function reached(promise) {
  try {
    return await promise;
  } catch (error) {
    throw error instanceof TypeError ? new Refused(GONE) : error;
  }
}

async function body(response) {
  const found = await response.json().catch(() => ({}));
  if (response.ok) return found;
  const { message, code } = found.error ?? { message: `the server answered ${response.status}; try again` };
  throw new Refused(message, code, response.status);
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  for (;;) {
    const { value, done } = await reached(reader.read());
    if (done) return;
    const parts = (left + value).split("\n\n");
    left = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      if (part === "data: [DONE]") return;
      yield JSON.parse(part.slice(6));
    }
  }
}
