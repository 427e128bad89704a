// Python's random.Random(text).getrandbits(24): with the same seed the page draws the numbers that smalllm draws.

/** The Mersenne Twister (Matsumoto & Nishimura 1998), seeded with a text as Python does it: the text and its SHA-512. */
class Random {
  #state = new Uint32Array(624);
  #place = 624;

  constructor(text) {
    const bytes = new TextEncoder().encode(text);
    const number = [...bytes, ...sha512(bytes)].reverse(); // a number, its lowest byte first
    while (number.length % 4) number.push(0);
    this.#seed(new Uint32Array(new Uint8Array(number).buffer));
  }

  #seed(key) {
    const state = this.#state, size = state.length;
    state[0] = 19650218;
    for (let i = 1; i < size; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
    let i = 1, j = 0;
    const next = () => {
      if (++i === size) [state[0], i] = [state[size - 1], 1];
    };
    for (let k = Math.max(size, key.length); k; k--, next()) {
      state[i] = (state[i] ^ Math.imul(state[i - 1] ^ (state[i - 1] >>> 30), 1664525)) + key[j] + j;
      j = (j + 1) % key.length;
    }
    for (let k = size - 1; k; k--, next()) state[i] = (state[i] ^ Math.imul(state[i - 1] ^ (state[i - 1] >>> 30), 1566083941)) - i;
    state[0] = 0x80000000;
  }

  #turn() {
    const state = this.#state;
    for (let i = 0; i < 624; i++) {
      const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
      state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
    }
    this.#place = 0;
  }

  /** The next number in [0, 1), of 24 bits. */
  uniform() {
    if (this.#place === 624) this.#turn();
    let y = this.#state[this.#place++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    y ^= y >>> 18;
    return (y >>> 8) / (1 << 24);
  }
}

/** SHA-512 (FIPS 180-4) of bytes. crypto.subtle has it only where a browser calls a page secure. */
function sha512(bytes) {
  const MASK = (1n << 64n) - 1n;
  const turned = (x, n) => ((x >> n) | (x << (64n - n))) & MASK;
  const primes = [];
  for (let n = 2; primes.length < 80; n++) if (primes.every((p) => n % p)) primes.push(n);
  const fraction = (n, power) => { // of the root, 64 bits
    let low = 0n, high = 1n << 72n;
    const goal = BigInt(n) << (64n * power);
    while (high - low > 1n) {
      const middle = (low + high) >> 1n;
      if (middle ** power <= goal) low = middle;
      else high = middle;
    }
    return low & MASK;
  };
  const constants = primes.map((p) => fraction(p, 3n)), hash = primes.slice(0, 8).map((p) => fraction(p, 2n));
  const padded = new Uint8Array(Math.ceil((bytes.length + 17) / 128) * 128), view = new DataView(padded.buffer);
  padded.set(bytes);
  padded[bytes.length] = 0x80;
  view.setBigUint64(padded.length - 8, BigInt(bytes.length) * 8n);
  for (let block = 0; block < padded.length; block += 128) {
    const w = Array.from({ length: 16 }, (_, i) => view.getBigUint64(block + 8 * i));
    for (let i = 16; i < 80; i++) {
      const a = turned(w[i - 15], 1n) ^ turned(w[i - 15], 8n) ^ (w[i - 15] >> 7n);
      const b = turned(w[i - 2], 19n) ^ turned(w[i - 2], 61n) ^ (w[i - 2] >> 6n);
      w.push((w[i - 16] + a + w[i - 7] + b) & MASK);
    }
    let [a, b, c, d, e, f, g, h] = hash;
    for (let i = 0; i < 80; i++) {
      const one = h + (turned(e, 14n) ^ turned(e, 18n) ^ turned(e, 41n)) + ((e & f) ^ (~e & g)) + constants[i] + w[i];
      const two = (turned(a, 28n) ^ turned(a, 34n) ^ turned(a, 39n)) + ((a & b) ^ (a & c) ^ (b & c));
      [h, g, f, e, d, c, b, a] = [g, f, e, (d + one) & MASK, c, b, a, (one + two) & MASK];
    }
    [a, b, c, d, e, f, g, h].forEach((x, i) => (hash[i] = (hash[i] + x) & MASK));
  }
  return hash.flatMap((x) => Array.from({ length: 8 }, (_, i) => Number((x >> BigInt(56 - 8 * i)) & 255n)));
}
