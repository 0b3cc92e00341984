#!/usr/bin/env python
r"""
Give a trained model of emoji scenes another text tokenizer, with more words and room for longer prompts, as the start
of further training: image tokens, layers and positions stay, and what a piece meant to the old tokenizer it means to
the new one.

    python training_scripts/emoji/grow_model.py --model src/cogview_pipelines/demo/models/cogview2-emoji \
        --tokenizer runs/tokenizer_sentences --scope src/cogview_pipelines/demo/data/scope_small.json \
        --output_dir runs/grown

A piece that is new starts as the word it stands for ("bunny" as "rabbit"); one that stands for none of the model's
words starts at random.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cogview_pipelines import CogLMCanvasModel, CogLMModel, IcetkTokenizer
from cogview_pipelines.demo import BACKGROUNDS, RELATIONS, STYLES, Scope, load_concepts
from cogview_pipelines.demo.captions import known_words, load_grammar, nouns, to_traditional
from cogview_pipelines.training.arguments import parse_config, run_script

STAGES = {
    "transformer": CogLMModel,
    "direct_sr_transformer": CogLMCanvasModel,
    "iterative_sr_transformer": CogLMCanvasModel,
}
SIDES = {"left": "left of", "right": "right of", "top": "above", "bottom": "below"}


@dataclass
class GrowConfig:
    model: str = field(metadata={"help": "Folder of the pipeline to start from."})
    tokenizer: str = field(metadata={"help": "Folder of the new tokenizer, with the same number of image tokens."})
    output_dir: str = field(metadata={"help": "Where the grown stages are written, a folder for each."})
    scope: str | None = field(
        default=None,
        metadata={"help": "scope.json of what it will be trained on: its words are written to words.txt."},
    )
    max_text_tokens: int = field(default=60, metadata={"help": "Room for a prompt."})
    seed: int = field(default=0, metadata={"help": "Of the rows that start at random."})
    config: str | None = field(
        default=None, metadata={"help": "YAML file with any of these options; the command line wins over it."}
    )


def same_words() -> Iterator[tuple[str, str]]:
    """Words of the grammar, each with the word of the templates that says the same."""
    for language in ("en", "zh"):
        grammar, english = load_grammar(language), language == "en"
        for table, known in (("colours", BACKGROUNDS), ("styles", STYLES), ("places", RELATIONS)):
            for key, entry in known.items():
                first = (key if table == "colours" else entry.english) if english else entry.chinese
                yield from ((word, first) for word in grammar[table][key])
        for slot, relation in SIDES.items():
            first = RELATIONS[relation].english if english else RELATIONS[relation].chinese
            yield from ((word, first) for word in grammar["sides"][slot])
        for hexcode in load_concepts():
            first, *others = nouns(hexcode, language)
            yield from ((word.removeprefix("~"), first) for word in (first, *others))


def start_rows(old: IcetkTokenizer, new: IcetkTokenizer) -> dict[int, list[int]]:
    """Ids of the old tokenizer, by those ids of the new one that they are a start for."""
    found = {new_id: [new_id] for new_id in range(new.num_image_tokens)}
    pieces = old.get_vocab()
    for piece, new_id in new.get_vocab().items():
        if piece in pieces:
            found[new_id] = [pieces[piece]]
    meant = defaultdict(list)
    for word, first in same_words():
        known = set(old.sp_model.encode(first, out_type=str)) - {"▁"}
        targets = [pieces[piece] for piece in known if piece not in ("▁to", "▁the", "▁of", "▁a")]
        for form in (word, to_traditional(word)):
            for index in new.encode(form):
                if index not in found:
                    meant[index] += targets
    return found | meant


Model = CogLMModel | CogLMCanvasModel


@torch.no_grad()
def grow(model: Model, rows: dict[int, list[int]], options: dict, seed: int) -> Model:
    """The model with other options in its config, its tables of words and positions laid out anew."""
    torch.manual_seed(seed)
    old, config = model.config, type(model.config).from_dict({**model.config.to_dict(), **options})
    grown, shares_backbone = type(model)(config), getattr(config, "shares_backbone", False)
    state = {name: value.float() for name, value in model.state_dict().items()}
    if not shares_backbone:
        words = torch.randn(config.vocab_size, config.hidden_size) * config.initializer_range
        for new_id, old_ids in rows.items():
            meaning = state["word_embeddings.weight"][old_ids].mean(0)
            noise = 0.0 if len(old_ids) == 1 else 0.1 * words[new_id]
            words[new_id] = meaning + noise
        positions = torch.randn(config.max_position_embeddings, config.hidden_size) * config.initializer_range
        table = state["position_embeddings.weight"]
        positions[: old.image_position] = table[: old.image_position]
        length = 1 + old.layout.image_length
        positions[config.image_position :][:length] = table[old.image_position :][:length]
        state |= {"word_embeddings.weight": words, "position_embeddings.weight": positions}
    grown.load_state_dict(state, strict=not shares_backbone)
    return grown


def main(arguments: list[str] | None = None) -> None:
    config = parse_config(GrowConfig, arguments, description=__doc__)
    old = IcetkTokenizer.from_pretrained(Path(config.model) / "tokenizer")
    new = IcetkTokenizer.from_pretrained(config.tokenizer)
    rows = start_rows(old, new)
    print(f"{len(new) - len(rows)} of {len(new) - new.num_image_tokens} pieces start at random.")
    if config.scope is not None:
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        words = known_words(Scope.load(config.scope))
        Path(config.output_dir, "words.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    position = config.max_text_tokens + 4
    for stage, model_class in STAGES.items():
        model = model_class.from_pretrained(Path(config.model) / stage, dtype=torch.float32)
        options = {
            "vocab_size": len(new),
            "pad_token_id": new.pad_token_id,
            "boi_token_id": new.boi_token_id,
            "start_of_english_token_id": new.start_of_english_id,
            "start_of_chinese_token_id": new.start_of_chinese_id,
            "max_text_tokens": config.max_text_tokens,
            "image_position": position,
            "max_position_embeddings": position + 1 + model.config.layout.image_length,
        }
        if model_class is CogLMCanvasModel:
            options["num_text_slots"] = config.max_text_tokens + 1
        grow(model, rows, options, config.seed).save_pretrained(Path(config.output_dir) / stage)


if __name__ == "__main__":
    run_script(main)
