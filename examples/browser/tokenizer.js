// CLIP's tokenizer: `new Tokenizer(await (await fetch("tokenizer.json")).json()).encode("a prompt")` gives 77 ids.
// Byte-pair encoding over bytes with an end-of-word mark (arXiv 2103.00020); for the browser and for Node.

const WORDS = /<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+/giu;

// Bytes that can be printed stand for themselves, the others for characters from 256 on.
function characters() {
  const found = [];
  for (let byte = 0, next = 256; byte < 256; ++byte) {
    const printable = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    found.push(String.fromCodePoint(printable ? byte : next++));
  }
  return found;
}

export class Tokenizer {
  // json: a tokenizer.json of a CLIP tokenizer.
  constructor(json, length = 77) {
    this.vocab = json.model.vocab;
    this.length = length;
    const special = Object.fromEntries((json.added_tokens ?? []).map((token) => [token.content, token.id]));
    const id = (token) => special[token] ?? this.vocab[token];
    this.start = id("<|startoftext|>");
    this.end = id("<|endoftext|>");
    this.ranks = new Map(json.model.merges.map((pair, i) => [Array.isArray(pair) ? pair.join(" ") : pair, i]));
    this.characters = characters();
  }

  // Token ids of a prompt: start, tokens, end, and end again up to the length. What does not fit is left out.
  encode(prompt) {
    const text = prompt.normalize("NFC").replace(/\s+/gu, " ").toLowerCase();
    const ids = (text.match(WORDS) ?? []).flatMap((word) => this.word(word));
    const kept = [this.start, ...ids.slice(0, this.length - 2), this.end];
    return [...kept, ...Array(this.length - kept.length).fill(this.end)];
  }

  word(word) {
    if (word === "<|startoftext|>") return [this.start];
    if (word === "<|endoftext|>") return [this.end];
    let parts = [...new TextEncoder().encode(word)].map((byte) => this.characters[byte]);
    parts[parts.length - 1] += "</w>";
    for (;;) {
      let best = Infinity;
      for (let i = 0; i + 1 < parts.length; ++i) best = Math.min(best, this.ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity);
      if (best === Infinity) return parts.map((part) => this.vocab[part] ?? this.end);
      const merged = [];
      for (let i = 0; i < parts.length; ++i) {
        const pair = this.ranks.get(`${parts[i]} ${parts[i + 1]}`) === best;
        merged.push(pair ? parts[i] + parts[++i] : parts[i]);
      }
      parts = merged;
    }
  }
}
