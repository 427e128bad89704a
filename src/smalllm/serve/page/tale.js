// Text that streams in: a request for a completion becomes tokens with their alternatives.

import { stream } from "./api.js";

const SHORTEST_PROMPT = 100;

/**
 * Yields {tokens: [{text, piece, probability, top: [[piece, probability], …]}]} as they come and {finish} at last. The
 * texts of all tokens joined are exactly the text of the completion. Of a prompt that the model's context cannot hold,
 * the model reads the end: then {shortened: true} comes first.
 */
export async function* tokensOf(body, signal, waiting) {
  for (let prompt = body.prompt; ; prompt = laterHalf(prompt)) {
    try {
      return yield* told({ ...body, prompt }, signal, waiting);
    } catch (error) {
      if (error.code !== "context_length_exceeded" || prompt.length < SHORTEST_PROMPT) throw error;
      yield { tokens: [], shortened: true };
    }
  }
}

async function* told(body, signal, waiting) {
  const request = { ...body, logprobs: 8, stream_options: { include_usage: true } };
  for await (const { choices } of stream("v1/completions", request, signal, waiting)) {
    if (!choices?.length) continue; // the usage
    const [{ text, logprobs, finish_reason: finish }] = choices;
    yield { tokens: cut(text ?? "", logprobs), finish };
  }
}

/** The second half of a text, from the beginning of a word. */
function laterHalf(text) {
  const later = text.slice(Math.ceil(text.length / 2)), word = later.search(/\s\S/);
  return word < 0 ? later : later.slice(word + 1);
}

/** The tokens of one event. A character may be spread over several tokens: then the last of them carries it. */
function cut(text, logprobs) {
  const pieces = logprobs?.tokens ?? [];
  let rest = text;
  const tokens = pieces.map((piece, index) => {
    const own = rest.startsWith(piece) ? piece : rest.slice(0, Math.max(0, carried(rest, piece, pieces[index + 1])));
    rest = rest.slice(own.length);
    return { text: own, piece, probability: Math.exp(logprobs.token_logprobs?.[index] ?? 0), top: ordered(logprobs.top_logprobs?.[index]) };
  });
  if (rest && tokens.length) tokens.at(-1).text += rest;
  else if (rest) tokens.push({ text: rest, piece: rest, probability: 1, top: [] });
  return tokens;
}

const BROKEN = "\ufffd"; // how a token is spelled that holds bytes of a character

/** How many characters of the rest belong to a token that ends one: those before the next token, if that one is whole. */
const carried = (rest, piece, next) => (piece.includes(BROKEN) && next && !next.includes(BROKEN) ? rest.indexOf(next) : 0);

const ordered = (top) => Object.entries(top ?? {}).map(([piece, logprob]) => [piece, Math.exp(logprob)]).sort((a, b) => b[1] - a[1]);

/** Time to the first piece and pieces per second after it. */
export class Pace {
  #begin = performance.now();
  #first = 0;
  #firstCount = 0;
  #last = 0;
  count = 0;

  add(tokens) {
    this.#last = performance.now();
    this.count += tokens;
    if (this.#first === 0) [this.#first, this.#firstCount] = [this.#last, this.count];
  }

  get firstToken() {
    return this.#first ? `the first after ${Math.max(1, Math.round(this.#first - this.#begin))} ms` : "";
  }

  get speed() {
    const seconds = (this.#last - this.#first) / 1000;
    return seconds > 0.05 ? `${Math.round((this.count - this.#firstCount) / seconds).toLocaleString("en-US")} per second` : "";
  }
}
