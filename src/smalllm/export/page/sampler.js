// The choice of the next token, as class Choice in native/decode.cpp: penalty, temperature, top-k, top-p, min-p, draw.

const LOWEST = -3.4028234663852886e38;

/** The next id, from logits that are overwritten; -1 where they are not numbers. `history`: the ids so far. */
function choose(logits, params, history, forbidden, random) {
  for (const id of forbidden) logits[id] = -Infinity;
  if (params.repetition_penalty !== 1) {
    const penalty = Math.fround(params.repetition_penalty);
    for (const id of new Set(history)) logits[id] = logits[id] > 0 ? logits[id] / penalty : logits[id] * penalty;
  }
  const most = greatest(logits);
  if (!Number.isFinite(most)) return -1;
  if (params.temperature === 0) return logits.indexOf(most);
  const inverse = Math.fround(1 / Math.min(Math.max(params.temperature, 1e-30), 1e30));
  for (let id = 0; id < logits.length; id++) logits[id] = Math.max(Math.fround(logits[id] - most) * inverse, LOWEST);
  if (params.top_k > 0 && params.top_k < logits.length) keepTopK(logits, params.top_k);
  if (params.top_p < 1) keepTopP(logits, params.top_p);
  if (params.min_p > 0) dropBelow(logits, Math.fround(Math.log(params.min_p)));
  return draw(logits, random.uniform());
}

function greatest(numbers) {
  let most = -Infinity;
  for (const x of numbers) {
    if (!(x < Infinity)) return NaN;
    if (x > most) most = x;
  }
  return most;
}

function dropBelow(logits, bound) {
  for (let id = 0; id < logits.length; id++) if (logits[id] < bound) logits[id] = -Infinity;
}

/** Keep the k most likely tokens, with all that tie with the last of them. */
function keepTopK(logits, k) {
  const ordered = logits.slice().sort();
  dropBelow(logits, ordered[ordered.length - k]);
}

/** Keep the most likely tokens up to the one with which their mass reaches p. */
function keepTopP(logits, p) {
  const mass = (bound) => {
    let total = 0;
    for (const x of logits) if (x >= bound) total += Math.exp(x);
    return total;
  };
  const wanted = p * mass(-Infinity);
  let bound = -1; // candidates are above it: fewer to sort
  while (bound > -256 && mass(bound) < wanted) bound *= 2;
  if (bound <= -256) bound = LOWEST;
  const found = [];
  logits.forEach((x, id) => x >= bound && found.push(id));
  found.sort((a, b) => logits[b] - logits[a] || a - b);
  let before = 0, kept = 0;
  while (kept < found.length && (kept === 0 || before < wanted)) before += Math.exp(logits[found[kept++]]);
  const keep = new Set(found.slice(0, kept));
  for (let id = 0; id < logits.length; id++) if (!keep.has(id)) logits[id] = -Infinity;
}

/** Where the cumulative distribution passes `uniform` of its sum. */
function draw(logits, uniform) {
  let total = 0, passed = 0, last = 0;
  for (const x of logits) total += Math.exp(x);
  for (let id = 0; id < logits.length; id++) {
    const power = Math.exp(logits[id]);
    if (power > 0) last = id;
    if ((passed += power) > uniform * total) return id;
  }
  return last;
}
