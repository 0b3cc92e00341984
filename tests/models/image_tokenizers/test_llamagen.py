"""LlamaGen's image tokenizer: tensors under released names give the tokens and pixels that its network computes."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from cogview_pipelines import CogView2Pipeline, CogViewPipeline, DiffusersVQModel
from cogview_pipelines.models.image_tokenizers.auto import load_image_tokenizer

from ...utils import make_coglm, token_config
from ...utils_cogview import make_cogview_tokenizer

WIDTHS, LATENT, CODES, CODE_WIDTH = (32, 32, 64), 16, 48, 8


class Release:
    """
    The released network, written as a function of its tensors. A first walk over it makes them.

    Two residual blocks a level (three in the decoder), attention at the coarsest level and in the middle, group norms
    of 32, codes compared by angle.
    """

    def __init__(self):
        self.tensors, self.making = {}, True
        self.encode(torch.zeros(1, 3, 8, 8))
        self.decode(torch.zeros(1, 2, 2, dtype=torch.long))
        self.making = False

    def get(self, name, *shape):
        if self.making:
            fan_in = math.prod(shape[1:]) if len(shape) > 1 else 25
            self.tensors[name] = torch.randn(shape) * fan_in**-0.5 + ("norm" in name and name.endswith("weight"))
        return self.tensors[name]

    def conv(self, x, name, width, kernel=3, **options):
        weight = self.get(f"{name}.weight", width, x.shape[1], kernel, kernel)
        return F.conv2d(x, weight, self.get(f"{name}.bias", width), **options)

    def norm(self, x, name):
        weights = (self.get(f"{name}.{kind}", x.shape[1]) for kind in ("weight", "bias"))
        return F.group_norm(x, 32, *weights, eps=1e-6)

    def resnet(self, x, name, width):
        h = self.conv(F.silu(self.norm(x, f"{name}.norm1")), f"{name}.conv1", width, padding=1)
        h = self.conv(F.silu(self.norm(h, f"{name}.norm2")), f"{name}.conv2", width, padding=1)
        return h + (x if x.shape[1] == width else self.conv(x, f"{name}.nin_shortcut", width, 1))

    def attention(self, x, name):
        width, h = x.shape[1], self.norm(x, f"{name}.norm")
        query, key, value = (self.conv(h, f"{name}.{part}", width, 1).flatten(2) for part in "qkv")
        weights = (query.transpose(1, 2) @ key * width**-0.5).softmax(2)
        return x + self.conv((value @ weights.transpose(1, 2)).view_as(x), f"{name}.proj_out", width, 1)

    def middle(self, x, name):
        x = self.attention(self.resnet(x, f"{name}.0", x.shape[1]), f"{name}.1")
        return self.resnet(x, f"{name}.2", x.shape[1])

    def level(self, x, name, width, blocks, with_attention):
        for block in range(blocks):
            x = self.resnet(x, f"{name}.res.{block}", width)
            if with_attention:
                x = self.attention(x, f"{name}.attn.{block}")
        return x

    def encode(self, pixels):
        x = self.conv(pixels, "encoder.conv_in", WIDTHS[0], padding=1)
        for level, width in enumerate(WIDTHS):
            coarsest = level == len(WIDTHS) - 1
            x = self.level(x, f"encoder.conv_blocks.{level}", width, 2, coarsest)
            if not coarsest:
                name = f"encoder.conv_blocks.{level}.downsample.conv"
                x = self.conv(F.pad(x, (0, 1, 0, 1)), name, width, stride=2)
        x = F.silu(self.norm(self.middle(x, "encoder.mid"), "encoder.norm_out"))
        x = self.conv(self.conv(x, "encoder.conv_out", LATENT, padding=1), "quant_conv", CODE_WIDTH, 1)
        codes = F.normalize(self.get("quantize.embedding.weight", CODES, CODE_WIDTH), dim=1)
        return torch.einsum("bchw,nc->bhwn", F.normalize(x, dim=1), codes).argmax(-1)

    def decode(self, tokens):
        codes = F.normalize(self.get("quantize.embedding.weight", CODES, CODE_WIDTH), dim=1)
        x = self.conv(codes[tokens].movedim(-1, 1), "post_quant_conv", LATENT, 1)
        x = self.middle(self.conv(x, "decoder.conv_in", WIDTHS[-1], padding=1), "decoder.mid")
        for level, width in enumerate(reversed(WIDTHS)):
            x = self.level(x, f"decoder.conv_blocks.{level}", width, 3, level == 0)
            if level < len(WIDTHS) - 1:
                name = f"decoder.conv_blocks.{level}.upsample.conv"
                x = self.conv(F.interpolate(x, scale_factor=2), name, width, padding=1)
        return self.conv(F.silu(self.norm(x, "decoder.norm_out")), "decoder.conv_out", 3, padding=1)


@pytest.fixture(scope="module")
def release():
    torch.manual_seed(0)
    return Release()


@pytest.fixture(scope="module")
def tensors(release):
    return {**release.tensors, "quantize.codebook_used": torch.zeros(65536)}


@torch.no_grad()
def test_tokens_and_pixels_are_those_of_the_release(release, tensors):
    model = DiffusersVQModel.from_llamagen(tensors, num_clusters=6)
    pixels = torch.rand(2, 3, 32, 48)
    tokens = release.encode(2 * pixels - 1)
    assert tokens.unique().numel() > 8
    assert torch.equal(model.encode(pixels).tokens, tokens)
    assert torch.allclose(model.decode(tokens).sample, (release.decode(tokens) + 1) / 2, atol=1e-5)
    assert model.config.compression_rates == (4,) and model.config.num_embeddings == CODES
    assert sorted(model.cluster_labels.unique().tolist()) == list(range(6))


@torch.no_grad()
@pytest.mark.parametrize("name", ["vq_ds4_t2i.pt", "tensors.pt", "vq.safetensors"])
def test_files_are_read_and_the_model_is_saved_and_loaded(tensors, name, tmp_path):
    if name.endswith(".safetensors"):
        save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / name)
    else:
        torch.save(tensors if name == "tensors.pt" else {"model": tensors}, tmp_path / name)
    model = DiffusersVQModel.from_llamagen(tmp_path / name, num_clusters=6)
    model.save_pretrained(tmp_path / "model")
    loaded = load_image_tokenizer(tmp_path / "model")
    pixels = torch.rand(1, 3, 16, 16)
    assert torch.equal(loaded.encode(pixels).tokens, DiffusersVQModel.from_llamagen(tensors, 6).encode(pixels).tokens)


def prepare(tensors, folder, fine_size):
    """Four pictures as tokens in `folder`/tokens; options of the scripts that go on with them, no rate among them."""
    from ...training_scripts.conftest import as_arguments, load_script

    DiffusersVQModel.from_llamagen(tensors, num_clusters=6).save_pretrained(folder / "vqvae")
    parts = {"vqvae": folder / "vqvae", "tokenizer": folder / "tokenizer"}
    pictures = folder / "pictures"
    pictures.mkdir()
    pixels = torch.randint(0, 256, (4, 4, 4, 3), dtype=torch.uint8)
    for index, picture in enumerate(pixels):
        Image.fromarray(picture.numpy()).resize((16, 16), Image.Resampling.BICUBIC).save(pictures / f"{index}.png")
    lines = [json.dumps({"file": f"{index}.png", "en": "a cat"}) + "\n" for index in range(4)]
    (pictures / "captions.jsonl").write_text("".join(lines))
    options = {"vqvae": parts["vqvae"], "image_folder": pictures, "captions": pictures / "captions.jsonl"}
    options |= {"low_size": 16, "fine_size": fine_size, "output_dir": folder / "tokens"}
    load_script("prepare_tokens").main(as_arguments(options))
    options = {**parts, "data": folder / "tokens", "output_dir": folder / "run", "batch_size": 2}
    return parts, {**options, "max_steps": 1, "warmup_steps": 0, "sample_every_steps": 1}


def test_it_goes_through_preparation_training_and_a_pipeline(release, tensors, tokenizer, tmp_path):
    from ...training_scripts.conftest import COGLM, as_arguments, load_script

    tokenizer.save_pretrained(tmp_path / "tokenizer")
    parts, options = prepare(tensors, tmp_path, fine_size=0)
    low = load_file(tmp_path / "tokens/tokens.safetensors")["low"]
    for index in range(4):
        pixels = np.array(Image.open(tmp_path / "pictures" / f"{index}.png"))
        picture = torch.from_numpy(pixels).movedim(-1, 0)[None] / 255
        assert torch.equal(release.encode(2 * picture - 1)[0], low[index].long())

    load_script("train_coglm").main(as_arguments({**options, "model": COGLM}))
    assert [path.name for path in (tmp_path / "run/samples").iterdir()] == ["0000001.png"]
    parts |= {"transformer": tmp_path / "run/final", "dtype": "float32", "output_dir": tmp_path / "model"}
    load_script("assemble_pipeline").main(as_arguments(parts))
    pipe = CogView2Pipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    tokens = pipe("a cat", generator=torch.Generator().manual_seed(1), output_type="latent").tokens
    (image,) = pipe("a cat", generator=torch.Generator().manual_seed(1), output_type="pt").images
    assert tokens.shape == (1, 4, 4) and image.shape == (3, 16, 16)
    assert torch.allclose(image, (release.decode(tokens)[0] + 1).clamp(0, 2) / 2, atol=1e-4)
    with pytest.raises(ValueError, match=r"`compression_rate` must be one of \[4\], which `vqvae` has, but is 8"):
        load_script("assemble_pipeline").main(as_arguments({**parts, "compression_rate": 8}))


@pytest.mark.parametrize("script", ["train_direct_sr", "train_iterative_sr"])
def test_super_resolution_trains_with_it_and_shows_sample_pictures(script, tensors, tokenizer, tmp_path):
    from ...training_scripts.conftest import WINDOWS, as_arguments, load_script

    tokenizer.save_pretrained(tmp_path / "tokenizer")
    make_coglm(**token_config(tokenizer)).save_pretrained(tmp_path / "coglm")
    _, options = prepare(tensors, tmp_path, fine_size=48)
    options |= {"transformer": tmp_path / "coglm", "model": {"num_text_slots": 30, **WINDOWS}}
    load_script(script).main(as_arguments(options))
    with Image.open(tmp_path / "run/samples/0000001.png") as grid:
        assert grid.width % 48 == 0 and grid.height % 48 == 0


def test_cogview_is_trained_with_it_and_assembled_and_draws(tensors, tmp_path):
    from ...training_scripts.conftest import COGVIEW, as_arguments, load_script

    (tmp_path / "pieces").mkdir()
    make_cogview_tokenizer(tmp_path / "pieces").save_pretrained(tmp_path / "tokenizer")
    parts, options = prepare(tensors, tmp_path, fine_size=32)
    options |= {"model": COGVIEW, "super_resolution_probability": 0.5}
    load_script("train_cogview").main(as_arguments(options))
    assert len(list((tmp_path / "run/samples").iterdir())) == 2
    stages = dict.fromkeys(("transformer", "super_resolution_transformer"), tmp_path / "run/final")
    assemble = {**parts, **stages, "dtype": "float32", "output_dir": tmp_path / "model"}
    load_script("assemble_cogview_pipeline").main(as_arguments(assemble))
    pipe = CogViewPipeline.from_pretrained(tmp_path / "model")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a cat", generator=torch.Generator().manual_seed(1)).images[0].size == (16, 16)


class Unwanted:
    def __reduce__(self):
        return print, ("executed",)


def test_what_is_no_such_checkpoint_is_named(tensors, tmp_path, capsys):
    convert = DiffusersVQModel.from_llamagen
    with pytest.raises(ValueError, match=r"lacks: encoder\.mid_block\.resnets\.0\.norm1\.bias\."):
        convert({name: value for name, value in tensors.items() if name != "encoder.mid.0.norm1.bias"})
    with pytest.raises(ValueError, match=r"has too much: encoder\.surplus"):
        convert({**tensors, "encoder.surplus": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"other shapes: decoder\.conv_in\.weight"):
        convert({**tensors, "decoder.conv_in.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="has batch norms"):
        convert({**tensors, "encoder.norm_out.running_mean": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"lacks 'quantize\.embedding\.weight'"):
        convert({"weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="must be a file"):
        convert(tmp_path / "absent.pt")
    (tmp_path / "damaged.pt").write_bytes(b"no archive")
    (tmp_path / "damaged.safetensors").write_bytes(b"no header")
    torch.save({"model": tensors, "args": Unwanted()}, tmp_path / "objects.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for name in ("damaged.pt", "damaged.safetensors", "objects.pt", "list.pt"):
        with pytest.raises(ValueError, match=f"`source` .*{name}"):
            convert(tmp_path / name)
    assert "executed" not in capsys.readouterr().out
