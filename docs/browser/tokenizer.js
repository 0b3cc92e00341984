// Text to ids, as SentencePiece's unigram model and IcetkTokenizer do it, from tokenizer.json.

const SPACE = "\u2581"; // as SentencePiece writes it
const UNKNOWN_PENALTY = 10;
const SMALLEST_FLOAT = 1.1754943508222875e-38;

const utf8 = new TextEncoder();
const fromUtf8 = new TextDecoder();

export class Tokenizer {
  constructor(tables) {
    this.tables = tables;
    this.ids = new Map(); // of what a text may be cut into
    this.longest = 0; // in characters
    const scores = [];
    for (const [index, piece] of tables.pieces.entries()) {
      const kind = tables.kinds[index];
      if (kind === "unknown") this.unknown = index;
      if (kind === "normal") scores.push(tables.scores[index]);
      if (kind !== "normal" && kind !== "user_defined") continue;
      this.ids.set(piece, index);
      this.longest = Math.max(this.longest, [...piece].length);
    }
    this.lowest = Math.min(...scores) - UNKNOWN_PENALTY;
    this.highest = Math.max(SMALLEST_FLOAT, ...scores);
    this.userDefined = tables.pieces
      .filter((_, index) => tables.kinds[index] === "user_defined")
      .sort((a, b) => b.length - a.length);
    this.added = Object.keys(tables.added_tokens).sort((a, b) => b.length - a.length);
    const map = Uint8Array.from(atob(tables.charsmap), (letter) => letter.charCodeAt(0));
    const size = map.length ? new DataView(map.buffer).getUint32(0, true) : 0;
    this.trie = new Uint32Array(map.slice(4, 4 + size).buffer);
    this.texts = map.subarray(4 + size);
  }

  // Ids of a text, and the parts of it that have no piece.
  tokenize(text) {
    const ids = [];
    const unknown = new Set();
    for (const part of this.#cut(text)) {
      if (Object.hasOwn(this.tables.added_tokens, part)) {
        ids.push(this.tables.added_tokens[part]);
        continue;
      }
      for (const [id, piece] of this.#pieces(this.normalize(part))) {
        ids.push(id + this.tables.first_id);
        const letters = piece.replaceAll(SPACE, "");
        if (id === this.unknown && letters) unknown.add(letters);
      }
    }
    return { ids, unknown: [...unknown] };
  }

  encode(text) {
    return this.tokenize(text).ids;
  }

  // As they stand before <start_of_image>: a space at the end is a piece of its own there.
  encodeBeforeImage(text) {
    if (text.trim() && /\s$/u.test(text)) {
      const ids = this.encode(text + this.tables.boi_token);
      if (ids.at(-1) === this.tables.start_token_ids[0]) return ids.slice(0, -1);
    }
    return this.encode(text);
  }

  language(text) {
    const { first_chinese_id, vocab_size, start_token_ids } = this.tables;
    const isChinese = (id) => first_chinese_id <= id && id < vocab_size && !start_token_ids.includes(id);
    return this.encode(text).some(isChinese) ? "zh" : "en";
  }

  // The parts of a text that are lost on the model: without a piece, or not among the words it was trained on.
  unknownParts(text) {
    const { unknown } = this.tokenize(text);
    if (!this.tables.known_words) return unknown;
    const own = this.#cut(text).filter((part) => !Object.hasOwn(this.tables.added_tokens, part));
    const whole = unknownWords(text, this.tables.known_words);
    const left = unknownWords(own.join(" "), this.tables.known_words);
    const words = left.filter((word) => whole.some((one) => one.includes(word)));
    return [...words, ...unknown.filter((part) => !words.some((word) => word.includes(fold(part))))];
  }

  // A text without what `unknownParts` names, where the model brings the list of its words: what is drawn.
  knownText(text) {
    const unknown = this.tables.known_words ? this.unknownParts(text) : [];
    if (!unknown.length) return text;
    const known = this.#knownPart(text, unknown);
    return SAYS_SOMETHING.test(known) ? known : text;
  }

  // Whether anything is left of a text without what `unknownParts` names.
  knowsSome(text) {
    return SAYS_SOMETHING.test(this.#knownPart(text, this.unknownParts(text)));
  }

  #knownPart(text, unknown) {
    const words = this.tables.known_words ?? [];
    const without = (part) => {
      part = withoutWords(part, new Set(unknown), words);
      const lost = this.tokenize(part).unknown.sort((a, b) => b.length - a.length);
      for (const one of lost) part = part.replaceAll(one, HAS_CHINESE.test(one) ? "" : " ");
      return withoutWords(part, new Set(unknown), words); // what hangs in the air now
    };
    const parts = this.#cut(text).map((part) => (Object.hasOwn(this.tables.added_tokens, part) ? part : without(part)));
    return parts.join(" ").trim();
  }

  // Around tokens that were added to the model.
  #cut(text) {
    const parts = [""];
    for (let at = 0; at < text.length; ) {
      const token = this.added.find((one) => text.startsWith(one, at));
      if (token) parts.push(token, "");
      else parts[parts.length - 1] += text[at];
      at += token ? token.length : 1;
    }
    return parts.filter(Boolean);
  }

  normalize(text) {
    const { add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces, treat_whitespace_as_suffix } = this.tables;
    const space = escape_whitespaces ? SPACE : " ";
    const bytes = utf8.encode(text);
    let at = 0;
    const next = () => {
      const [replaced, length] = this.#prefix(bytes, at);
      at += length;
      return replaced;
    };
    let first = "";
    if (remove_extra_whitespaces) {
      while (at < bytes.length && (first = next()) === " ") first = "";
    } else if (at < bytes.length) first = next();
    if (first === "" && at >= bytes.length) return "";
    let result = add_dummy_prefix && !treat_whitespace_as_suffix ? space : "";
    let isAfterSpace = remove_extra_whitespaces;
    const append = (part) => {
      if (isAfterSpace) part = part.replace(/^ +/, "");
      if (part) {
        result += part.replaceAll(" ", space);
        isAfterSpace = part.endsWith(" ");
      }
      if (!remove_extra_whitespaces) isAfterSpace = false;
    };
    append(first);
    while (at < bytes.length) append(next());
    while (remove_extra_whitespaces && result.endsWith(space)) result = result.slice(0, -space.length);
    return add_dummy_prefix && treat_whitespace_as_suffix ? result + space : result;
  }

  // What the longest known beginning of the rest becomes, and how many bytes it has.
  #prefix(bytes, start) {
    const length = bytes[start] < 0x80 ? 1 : bytes[start] < 0xe0 ? 2 : bytes[start] < 0xf0 ? 3 : 4;
    for (const symbol of this.userDefined) {
      const wanted = utf8.encode(symbol);
      if (wanted.every((byte, index) => bytes[start + index] === byte)) return [symbol, wanted.length];
    }
    let found = null;
    if (this.trie.length) {
      const children = (unit) => (unit >>> 10) << ((unit & 0x200) >>> 6);
      let position = children(this.trie[0]);
      for (let at = start; at < bytes.length; at++) {
        position ^= bytes[at];
        const unit = this.trie[position];
        if (unit === undefined || (unit & 0x800000ff) >>> 0 !== bytes[at]) break;
        position ^= children(unit);
        if (unit & 0x100) found = [this.trie[position] & 0x7fffffff, at + 1 - start];
      }
    }
    if (!found) return [fromUtf8.decode(bytes.subarray(start, start + length)), length];
    const end = this.texts.indexOf(0, found[0]);
    return [fromUtf8.decode(this.texts.subarray(found[0], end)), found[1]];
  }

  // The likeliest way to cut a text into pieces; neighbours without a piece are one.
  #pieces(text) {
    const letters = [...text];
    const best = Array(letters.length + 1).fill(null);
    best[0] = { score: 0 };
    const offer = (end, score, start, id) => {
      if (!best[end] || score > best[end].score) best[end] = { score: Math.fround(score), start, id };
    };
    for (let start = 0; start < letters.length; start++) {
      const till = best[start].score;
      let piece = "";
      let hasSingle = false;
      for (let end = start + 1; end <= Math.min(letters.length, start + this.longest); end++) {
        piece += letters[end - 1];
        const id = this.ids.get(piece);
        if (id === undefined) continue;
        const isUserDefined = this.tables.kinds[id] === "user_defined";
        const score = isUserDefined ? utf8.encode(piece).length * this.highest - 0.1 : this.tables.scores[id];
        offer(end, isUserDefined ? score + till : Math.fround(score + till), start, id);
        if (end === start + 1) hasSingle = true;
      }
      if (!hasSingle) offer(start + 1, Math.fround(this.lowest + till), start, this.unknown);
    }
    const pieces = [];
    for (let end = letters.length; end > 0; end = best[end].start) {
      const { start, id } = best[end];
      const piece = letters.slice(start, end).join("");
      if (id === this.unknown && pieces[0]?.[0] === id) pieces[0][1] = piece + pieces[0][1];
      else pieces.unshift([id, piece]);
    }
    return pieces;
  }
}

const CHINESE = "\\u3400-\\u9fff\\uf900-\\ufaff";
const SAYS_SOMETHING = /[\p{L}\p{N}]/u;
const HAS_CHINESE = new RegExp(`[${CHINESE}]`, "u");
const BEGINS_CHINESE = new RegExp(`^[${CHINESE}]`, "u");
const MARKS = ",;:.!?\\uff0c\\uff1b\\uff1a\\uff01\\uff1f\\u3001\\u3002";
// What hangs in the air where a word is gone.
const SIGNS = "[-\\u2013\\u2014'\\u2019&+/|=]+";
const HANGING = new RegExp(`(?<![\\p{L}\\p{N}_])${SIGNS}|${SIGNS}(?![\\p{L}\\p{N}_])`, "gu");
const MARK = new RegExp(`\\s*([${MARKS}])(?:\\s*[${MARKS}])*`, "gu"); // several, with nothing between them any more
const END = new RegExp(`^[${MARKS}\\s]+|[,;:\\uff0c\\uff1b\\uff1a\\u3001\\s]+$`, "gu");
// What stands in angle brackets is a word of its own: learned words are mostly called so.
const BRACKETED = "[<\\uff1c][^<>\\uff1c\\uff1e\\s]+[>\\uff1e]";
const WORD = new RegExp(`${BRACKETED}|[${CHINESE}]+|(?:(?![${CHINESE}])[\\p{L}\\p{N}])+`, "gu");

// Letter by letter: at the end of a whole word, a small sigma would become another one.
function fold(text) {
  return Array.from(text.normalize("NFKC"), (letter) => letter.toUpperCase().toLowerCase()).join("");
}

function unknownWords(text, known) {
  const words = new Set(known.flatMap((word) => fold(word).match(WORD) ?? []));
  const longest = Math.max(0, ...[...words].filter(isChinese).map((word) => word.length));
  const found = new Set();
  for (const run of fold(text).match(WORD) ?? []) {
    if (isChinese(run)) for (const part of leftOf(run, words, longest)) found.add(part);
    else if (!words.has(run)) found.add(run);
  }
  return [...found];
}

// A text without some of its unknown words, and what is left of the punctuation around them.
function withoutWords(text, unknown, known) {
  const words = new Set(known.flatMap((word) => fold(word).match(WORD) ?? []));
  const longest = Math.max(0, ...[...words].filter(isChinese).map((word) => word.length));
  const kept = (run) => {
    if (!isChinese(run)) return (fold(run).match(WORD) ?? []).every((word) => unknown.has(word)) ? "" : run;
    const parts = cutOf(run.normalize("NFKC"), words, longest).filter(([part, isKnown]) => isKnown || !unknown.has(part));
    return parts.map(([part]) => part).join("");
  };
  text = text.replace(WORD, kept).replace(HANGING, " ").replace(MARK, "$1");
  return text.split(/\s+/u).filter(Boolean).join(" ").replace(END, "");
}

// Whether a run of letters is one of Chinese characters.
function isChinese(run) {
  return BEGINS_CHINESE.test(run);
}

// What is between the known words of a run of Chinese.
function leftOf(run, words, longest) {
  return cutOf(run, words, longest).filter(([, isKnown]) => !isKnown).map(([part]) => part);
}

// Known words of a run of Chinese, chosen so that least is between them, and what is between them.
function cutOf(run, words, longest) {
  const least = new Array(run.length + 1).fill(0); // characters that are left from each place on
  const steps = new Array(run.length).fill(0); // length of the word that begins at each place, or 0
  for (let at = run.length - 1; at >= 0; at--) {
    least[at] = least[at + 1] + 1;
    for (let end = at + 1; end <= Math.min(at + longest, run.length); end++) {
      if (least[end] > least[at] || !words.has(run.slice(at, end))) continue;
      [least[at], steps[at]] = [least[end], end - at];
    }
  }
  const parts = [];
  let start = 0;
  for (let at = 0; at < run.length; at += steps[at] || 1) {
    if (!steps[at]) continue;
    parts.push([run.slice(start, at), false], [run.slice(at, at + steps[at]), true]);
    start = at + steps[at];
  }
  return [...parts, [run.slice(start), false]].filter(([part]) => part);
}
