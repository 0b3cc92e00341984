// Prompts as JSON on stdin; what the page's tokenizer makes of them on stdout. Arguments: tokenizer.js and tokenizer.json.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const { Tokenizer } = await import(pathToFileURL(process.argv[2]));
const tokenizer = new Tokenizer(JSON.parse(readFileSync(process.argv[3])));
const encode = (text) => [
  tokenizer.encode(text),
  tokenizer.encodeBeforeImage(text),
  tokenizer.language(text),
  tokenizer.unknownParts(text),
  tokenizer.knownText(text),
  tokenizer.knowsSome(text),
];
console.log(JSON.stringify(JSON.parse(readFileSync(0)).map(encode)));
