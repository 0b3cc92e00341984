"""
Parity with the original CogView: its numbers (`fixtures/`) against this package, from the same released-format files.

Another folder of the same make goes through unchanged: `pytest tests/parity/cogview --cogview_fixtures DIR`.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cogview_pipelines.conversion.cogview.layout import TRANSPOSED, image_tokenizer_key, transformer_key
from cogview_pipelines.models.cogview.modeling_cogview import CogViewConfig, CogViewModel
from cogview_pipelines.models.cogview.tokenization_cogview import CogViewTokenizer
from cogview_pipelines.models.image_tokenizers.modeling_cogview_vq import CogViewVQConfig, CogViewVQModel


@pytest.fixture(scope="session")
def fixture_folder(request) -> Path:
    """The set of fixtures under test."""
    folder = Path(request.config.getoption("cogview_fixtures") or Path(__file__).parent / "fixtures")
    if not (folder / "MANIFEST.json").is_file():
        pytest.exit(f"{folder} holds no parity fixtures: it has no MANIFEST.json.", returncode=4)
    return folder


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """Where the models run."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(request.config.getoption("device"))


@pytest.fixture(scope="session")
def arrays(fixture_folder):
    """`arrays("t2i")`: the arrays of one file, by name."""
    loaded = {}

    def load(name: str) -> dict[str, np.ndarray]:
        if name not in loaded:
            with np.load(fixture_folder / f"{name}.npz") as file:
                loaded[name] = {key: file[key] for key in file.files}
        return loaded[name]

    return load


@pytest.fixture(scope="session")
def notes(fixture_folder) -> dict:
    """What the fixtures say about themselves: ids, names of parameters, kinds of errors."""
    return json.loads((fixture_folder / "MANIFEST.json").read_text("utf-8"))["notes"]


@pytest.fixture(scope="session")
def texts(fixture_folder) -> dict:
    """Encodings, query strings and templates of the original text tokenizer."""
    return json.loads((fixture_folder / "text_tokenizer.json").read_text("utf-8"))


@pytest.fixture(scope="session")
def text_tokenizer(fixture_folder, notes, tmp_path_factory) -> CogViewTokenizer:
    """The fixtures' text model, saved and loaded."""
    (model,) = (fixture_folder / "text_model").glob("*.model")
    folder = tmp_path_factory.mktemp("text_tokenizer")
    CogViewTokenizer(model, num_image_tokens=notes["ids"]["image_codes"]).save_pretrained(folder)
    return CogViewTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def vqvae(fixture_folder, device) -> CogViewVQModel:
    released = torch.load(fixture_folder / "checkpoints" / "vqvae_tiny.pt", weights_only=True)
    tensors = {image_tokenizer_key(key): value.float() for key, value in released.items()}
    tensors = {key: value.T if key in TRANSPOSED else value for key, value in tensors.items()}
    (num_embeddings, dim), channels = tensors["quantize.embed.weight"].shape, len(tensors["encoder.0.bias"])
    config = CogViewVQConfig(num_embeddings=num_embeddings, embedding_dim=dim, hidden_channels=channels)
    model = CogViewVQModel(config)
    model.load_state_dict(tensors)
    return model.eval().to(device)


@pytest.fixture(scope="session")
def transformer(fixture_folder, notes, device) -> CogViewModel:
    """The tiny model, with the released norms: one largest value for the whole tensor."""
    return load_transformer(fixture_folder, notes).to(device)


def load_transformer(fixture_folder, notes, **config) -> CogViewModel:
    (path,) = (fixture_folder / "checkpoints" / "cogview-tiny").glob("*/mp_rank_00_model_states.pt")
    released = torch.load(path, weights_only=True)["module"]
    tensors = {transformer_key(key): value.float() for key, value in released.items()}
    vocab_size, hidden_size = tensors["word_embeddings.weight"].shape
    fields = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("layers.")),
        "num_attention_heads": 2,
        "num_image_tokens": notes["ids"]["image_codes"],
        "command_token_id": notes["ids"]["command_tokens"]["[PAD]"],
        "norm_scale": "tensor",
    }
    model = CogViewModel(CogViewConfig(**{**fields, **config}))
    model.load_state_dict(tensors)
    return model.eval()
