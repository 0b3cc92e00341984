#!/usr/bin/env python3
"""
Train the text model of an `IcetkTokenizer` (SentencePiece unigram, English and Chinese) and save the tokenizer; with
`--family cogview` that of a `CogViewTokenizer`.

The tokenizer of the shipped model, from the captions of all emoji scenes:
    python training_scripts/train_tokenizer.py --config training_scripts/emoji/tokenizer_small.yaml
Your own captions, one JSON object a line with the keys `en` and `zh`, or plain text, one caption a line:
    python training_scripts/train_tokenizer.py --train_files captions.jsonl more.txt --output_dir runs/tokenizer
A vocabulary as large as the release's (20,000 image codes, 130,000 pieces), from much text:
    python training_scripts/train_tokenizer.py --train_files corpus/*.txt --vocab_size 130000 \\
        --character_coverage 0.9995 --num_threads 16 --output_dir runs/tokenizer

The pieces come out in the order of the release, so that the language of a text can be told from its ids: special
pieces, common ones (the word boundary, punctuation, digits, symbols), English, Chinese, rare (other scripts). Needs
the extra `training` (protobuf, PyYAML).
"""

import dataclasses
import io
import json
import logging
import random
import re
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import sentencepiece

from cogview_pipelines import demo
from cogview_pipelines.demo.captions import load_grammar, nouns, to_traditional
from cogview_pipelines.json_lines import is_unicode, parse_object, read_lines
from cogview_pipelines.models.cogview.tokenization_cogview import CogViewTokenizer
from cogview_pipelines.models.cogview2.tokenization_icetk import IcetkTokenizer
from cogview_pipelines.training.arguments import parse_config, read_words, run_script

logger = logging.getLogger("train_tokenizer")

GROUPS = ("common", "en", "zh", "rare")
WORD_BOUNDARY = "▁"
LEAST_COVERAGE = 0.98
MOST_NAMED = 40  # of the characters that have no piece, the most frequent
SPECIAL_PIECES = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3, "user_defined_symbols": ["<n>"]}


@dataclass
class TokenizerConfig:
    output_dir: str = field(metadata={"help": "Folder for the tokenizer."})
    config: str | None = field(
        default=None, metadata={"help": "YAML file with any of these options; the command line wins over it."}
    )
    family: str = field(
        default="cogview2",
        metadata={"help": "Whose tokenizer: the command tokens differ.", "choices": ["cogview2", "cogview"]},
    )
    train_files: list[str] = field(
        default_factory=list, metadata={"help": "Text files, one text a line, and .jsonl files, one object a line."}
    )
    caption_keys: list[str] = field(
        default_factory=lambda: ["en", "zh"],
        metadata={"help": "Keys of the texts in .jsonl files; each a text or a list of texts."},
    )
    emoji_captions: bool = field(
        default=False, metadata={"help": "Also train on the captions of the emoji scenes: all concepts and styles."}
    )
    emoji_pairs: int = field(default=5000, metadata={"help": "Scenes of two objects drawn for --emoji_captions."})
    emoji_sentences: int = field(
        default=0,
        metadata={"help": "Sentences of the grammar, in each language, that --emoji_captions adds to the templates."},
    )
    vocab_size: int = field(
        default=8000,
        metadata={"help": "Number of pieces at most, with the special ones; fewer if the text gives no more."},
    )
    num_image_tokens: int = field(default=20000, metadata={"help": "Image codes, whose ids come before the pieces."})
    whole_words: bool = field(
        default=False,
        metadata={
            "help": "Only whole words and single characters become pieces, not any substring: for captions made "
            "from templates, where SentencePiece would learn half sentences. Chinese words: see --words_file."
        },
    )
    words_file: str | None = field(
        default=None,
        metadata={"help": "Chinese words, one a line, for --whole_words (those of the emoji captions are known)."},
    )
    normalization: str = field(
        default="nmt_nfkc", metadata={"help": "SentencePiece rule; nmt_nfkc_cf also makes all letters lower case."}
    )
    character_coverage: float = field(
        default=1.0,
        metadata={
            "help": "Share of the text's characters that get a piece, from 0.98 on; the report names the others."
        },
    )
    required_characters: str = field(
        default="", metadata={"help": "Characters that get a piece although the text lacks them."}
    )
    split_by_number: bool = field(default=True, metadata={"help": "Never put digits and letters into one piece."})
    max_piece_length: int = field(default=16, metadata={"help": "Characters of a piece at most."})
    max_sentences: int = field(default=0, metadata={"help": "Draw this many lines from the text; 0: take all."})
    seed: int = field(default=0, metadata={"help": "For what is drawn: emoji scenes and --max_sentences."})
    num_threads: int = field(default=1, metadata={"help": "Threads of the trainer."})


# Text ----------------------------------------------------------------------------------------------------------------


def read_texts(path: str, keys: Iterable[str]) -> Iterator[str]:
    """
    The texts of a file: each line, or in a `.jsonl` file the values of `keys` (texts or lists of texts) in each
    object.

    Raises:
        ValueError: If the file cannot be read, or a line of a `.jsonl` file is not an object or has none of the keys.
    """
    for number, line in read_lines(path):
        line = line.strip()
        if not path.endswith(".jsonl"):
            yield line
            continue
        try:
            row = parse_object(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number} {error}") from error
        texts = [row[key] for key in keys if row.get(key)]
        if not texts:
            raise ValueError(f"{path}:{number} has none of the keys {list(keys)} (`--caption_keys`): {line[:80]!r}.")
        for text in texts:
            for each in [text] if isinstance(text, str) else text:
                if not is_unicode(each):
                    raise ValueError(
                        f"{path}:{number} must have Unicode text, but {each[:80]!r} holds half of a surrogate pair."
                    )
                yield each


def emoji_texts(num_pairs: int, seed: int) -> Iterator[str]:
    """All wordings, in both languages, of every scene of one object and of `num_pairs` scenes of two."""
    scope = demo.Scope(tuple(demo.load_concepts()), tuple(demo.STYLES), tuple(demo.BACKGROUNDS), demo.LAYOUTS)
    scenes = [*demo.iterate_scenes(scope, "single"), *demo.sample_scenes(scope, num_pairs, seed, "pair")]
    for scene, language in product(scenes, demo.LANGUAGES):
        yield from demo.captions(scene, language)
        for texts in demo.caption_variants(scene, language).values():
            yield from texts


def emoji_sentences(count: int, seed: int) -> Iterator[str]:
    """As many sentences of training patterns in each language, of scenes of all concepts and styles."""
    scope, rng = demo.Scope.full(), random.Random(seed)
    for _, language in product(range(count), demo.LANGUAGES):
        yield demo.sample_sentence(demo.sample_scene(scope, rng, pair_probability=0.4), language, rng).text


def emoji_words(with_sentences: bool = False) -> set[str]:
    """
    The Chinese words of the emoji captions; a coloured shape is two words, the colour and the shape.

    Args:
        with_sentences (`bool`): Also those of the grammar's tables, in both kinds of characters.
    """
    words = {"一", "在", "的", "和", "上的", "背景", "风格"}
    for table in (demo.STYLES, demo.BACKGROUNDS, demo.RELATIONS):
        words.update(entry.chinese for entry in table.values())
    colours = tuple(background.chinese for background in demo.BACKGROUNDS.values())
    for concept in demo.load_concepts().values():
        colour = next((colour for colour in colours if concept.shape and concept.noun_zh.startswith(colour)), "")
        words |= {concept.measure, concept.noun_zh.removeprefix(colour)}
    if not with_sentences:
        return words
    grammar = load_grammar("zh")
    for table in ("colours", "styles", "places", "sides"):
        words.update(word for synonyms in grammar[table].values() for word in synonyms)
    for table in ("adjectives", "mutual", "between"):
        words.update(grammar[table])
    for hexcode, concept in demo.load_concepts().items():
        if not concept.shape:
            words.update(nouns(hexcode, "zh"))
    return words | set(map(to_traditional, words))


# Pieces --------------------------------------------------------------------------------------------------------------


def script(character: str) -> str:
    """`"zh"` for Chinese characters, `"en"` for Latin letters, `"rare"` for other letters, `"common"` for all else."""
    if not character.isalpha():
        return "common"
    name = unicodedata.name(character, "")
    if name.startswith("CJK "):
        return "zh"
    return "en" if name.startswith("LATIN ") else "rare"


def group(piece: str) -> str:
    """The group of a piece: the last one, in the order of `GROUPS`, that any of its characters is of."""
    return max((script(character) for character in piece), key=GROUPS.index, default="common")


def order_pieces(model: bytes) -> tuple[bytes, dict[str, int]]:
    """
    Put the pieces of a serialised model into the order of the release: special, common, English, Chinese, rare.

    Within a group the more probable piece comes first, the lone word boundary before all. Scores stay as they are, so
    that the model cuts a text at the same places; only ids change.

    Returns:
        `tuple[bytes, dict[str, int]]`: The new model, and the number of pieces in each group (special ones count as
        common).
    """
    from sentencepiece import sentencepiece_model_pb2  # needs protobuf, which only training does

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    special = [piece for piece in proto.pieces if piece.type != piece.NORMAL]
    normal = [piece for piece in proto.pieces if piece.type == piece.NORMAL]
    normal.sort(key=lambda piece: (GROUPS.index(group(piece.piece)), piece.piece != WORD_BOUNDARY, -piece.score))
    counts = Counter(group(piece.piece) for piece in normal)
    counts["common"] += len(special)
    pieces = [type(piece).FromString(piece.SerializeToString()) for piece in special + normal]
    del proto.pieces[:]
    proto.pieces.extend(pieces)
    proto.trainer_spec.ClearField("seed_sentencepieces_file")  # the path of a temporary file
    return proto.SerializeToString(), {name: counts[name] for name in GROUPS}


def whole_word_seeds(texts: Iterable[str], chinese_words: Iterable[str], normalization: str) -> Counter:
    """
    The words in the texts, as candidates for pieces, with how often they occur.

    A word is a run of letters or digits with the space before it, or, in Chinese, an entry of `chinese_words` (the
    longest that fits); what stands between two of those is a word if it has at most four characters.
    """
    normalizer = sentencepiece.SentencePieceNormalizer(
        rule_name=normalization, add_dummy_prefix=True, escape_whitespaces=True, remove_extra_whitespaces=True
    )
    known = sorted({normalizer.Normalize(word).lstrip(WORD_BOUNDARY) for word in chinese_words}, key=len, reverse=True)
    known_words = re.compile("(" + "|".join(map(re.escape, known)) + ")") if known else None
    seeds = Counter()
    for text, count in Counter(texts).items():
        for run in re.findall(rf"{WORD_BOUNDARY}?[^\W_]+", normalizer.Normalize(text)):
            if not any(script(character) == "zh" for character in run):
                seeds[run] += count
                continue
            run = run.lstrip(WORD_BOUNDARY)
            for word in known_words.split(run) if known_words else [run]:
                if len(word) <= 4 or word in known:
                    seeds[word] += count
    return Counter({word: count for word, count in seeds.items() if len(word) > 1})


def train_model(texts: list[str], chinese_words: Iterable[str], config: TokenizerConfig) -> bytes:
    """Train SentencePiece on the texts; return the serialised model."""
    options, model = {}, io.BytesIO()
    with tempfile.TemporaryDirectory() as folder:
        if config.whole_words:
            seeds = whole_word_seeds(texts, chinese_words, config.normalization)
            options["seed_sentencepieces_file"] = str(Path(folder, "seeds.tsv"))
            rows = "".join(f"{word}\t{count}\n" for word, count in seeds.most_common())
            Path(folder, "seeds.tsv").write_text(rows, encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=config.vocab_size,
            hard_vocab_limit=False,
            character_coverage=config.character_coverage,
            required_chars=config.required_characters,
            normalization_rule_name=config.normalization,
            split_by_number=config.split_by_number,
            max_sentencepiece_length=config.max_piece_length,
            input_sentence_size=config.max_sentences,
            num_threads=config.num_threads,
            minloglevel=1,
            **SPECIAL_PIECES,
            **options,
        )
    return model.getvalue()


# The whole run -------------------------------------------------------------------------------------------------------


def check_config(config: TokenizerConfig):
    """Raise `ValueError` for what cannot work, before any work is done."""
    if not config.train_files and not config.emoji_captions:
        raise ValueError("There is nothing to train on: give `--train_files` or `--emoji_captions true`.")
    if config.vocab_size < 10:
        raise ValueError(f"`--vocab_size` must be at least 10, but is {config.vocab_size}.")
    if not LEAST_COVERAGE <= config.character_coverage <= 1:  # SentencePiece takes no less
        raise ValueError(
            f"`--character_coverage` must be from {LEAST_COVERAGE} to 1, but is {config.character_coverage}. To leave "
            "more characters out, take them out of the text."
        )


def train_tokenizer(config: TokenizerConfig) -> dict:
    """
    Train, order the pieces, save the tokenizer in `config.output_dir`.

    Returns:
        `dict`: `vocab_size` and `num_pieces`, the id range of each group, and for each language the mean and greatest
        number of tokens of a text, with the longest text; and how many tokens of the texts stand for characters
        without a piece (`unknown`), with those characters.
    """
    check_config(config)
    sentencepiece.set_random_generator_seed(config.seed)
    texts = [text for path in config.train_files for text in read_texts(path, config.caption_keys)]
    words = set(read_words(config.words_file)) if config.words_file else set()
    if config.emoji_captions:
        texts.extend(emoji_texts(config.emoji_pairs, config.seed))
        texts.extend(emoji_sentences(config.emoji_sentences, config.seed))
        words |= emoji_words(bool(config.emoji_sentences))
    if not texts:
        raise ValueError(f"`--train_files` {config.train_files} hold no text.")
    logger.info("%d texts, %d different", len(texts), len(set(texts)))

    model, counts = order_pieces(train_model(texts, words, config))
    ranges, first = {}, config.num_image_tokens
    for name in GROUPS:
        ranges[name] = (first, first + counts[name])
        first += counts[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.model")
        path.write_bytes(model)
        if config.family == "cogview":
            tokenizer = CogViewTokenizer(path, config.num_image_tokens)
        else:
            tokenizer = IcetkTokenizer(path, config.num_image_tokens, {key: ranges[key] for key in ("en", "zh")})
    tokenizer.save_pretrained(config.output_dir)
    report = {"vocab_size": len(tokenizer), "num_pieces": sum(counts.values()), "ranges": ranges}
    lengths, lost = {"en": {}, "zh": {}}, Counter()
    unknown = {"tokens": 0, "texts": 0}
    chinese = ranges["zh"][0] - config.num_image_tokens
    for text in dict.fromkeys(texts):
        pieces = tokenizer.sp_model.encode(text)  # far faster than `tokenizer.encode`, and the same
        if SPECIAL_PIECES["unk_id"] in pieces:
            unknown["tokens"] += pieces.count(SPECIAL_PIECES["unk_id"])
            unknown["texts"] += 1
            lost.update(character for part in tokenizer.parts_without_piece(text) for character in part)
        lengths["zh" if max(pieces, default=0) >= chinese else "en"][text] = len(pieces)
    for language, of_text in lengths.items():
        if of_text:
            longest = max(of_text, key=of_text.get)
            mean = round(sum(of_text.values()) / len(of_text), 2)
            report[language] = {"texts": len(of_text), "mean": mean, "max": of_text[longest], "longest": longest}
    report["unknown"] = {**unknown, "characters": "".join(character for character, _ in lost.most_common(MOST_NAMED))}
    if lost:
        logger.warning(
            "%d characters have no piece, and no model will read them: %s. In %d of %d different texts; a "
            "`--character_coverage` nearer to 1, or `--required_characters`, gives them one.",
            len(lost),
            report["unknown"]["characters"],
            unknown["texts"],
            sum(map(len, lengths.values())),
        )
    return report


def main(arguments: list[str] | None = None):
    """Run the script with these command-line arguments (default: those it was started with)."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = parse_config(TokenizerConfig, arguments, __doc__)
    report = train_tokenizer(config)
    Path(config.output_dir, "training_config.json").write_text(
        json.dumps(dataclasses.asdict(config), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    print(json.dumps(report, ensure_ascii=False))


if __name__ == "__main__":
    run_script(main)
