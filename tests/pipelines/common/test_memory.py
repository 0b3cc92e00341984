"""Where weights are, that they are there once, and that a call leaves nothing behind."""

import copy
import gc
import resource
import weakref

import accelerate
import pytest
import torch
from PIL import Image

from cogview_pipelines import (
    CogView2CaptionPipeline,
    CogView2InpaintPipeline,
    CogView2Pipeline,
    CogView2UpscalePipeline,
)
from cogview_pipelines.generation.canvas import LOGITS_BYTES
from cogview_pipelines.pipelines.common.memory import LOGITS, pictures_that_fit
from cogview_pipelines.pipelines.common.offloading import StageOffload

from ...utils import make_coglm
from ..cogview2.test_shared_components import use
from ..conftest import LOW

PROMPT = "a cat on a blue background."
STAGES = ("transformer", "direct_sr_transformer", "iterative_sr_transformer")


@pytest.fixture(scope="module")
def saved(shared_pipe, tmp_path_factory):
    """A folder with a pipeline whose first two stages share a backbone; weights are half precision."""
    folder = tmp_path_factory.mktemp("float16")
    copy_of(shared_pipe).to(torch.float16, silence_dtype_warnings=True).save_pretrained(folder)
    return folder


def copy_of(pipe, kind=CogView2Pipeline):
    """A pipeline with weights of its own, which may be moved."""
    pipe = kind.from_pipe(CogView2Pipeline(**copy.deepcopy(pipe.components)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(folder, **options):
    pipe = CogView2Pipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe, **call):
    return pipe("a cat", generator=torch.Generator().manual_seed(5), output_type="latent", **call).tokens


def assert_backbone_is_held_once(pipe):
    own = dict(pipe.transformer.named_parameters())
    lent = dict(pipe.direct_sr_transformer.named_parameters())
    assert own
    assert all(lent[name] is parameter for name, parameter in own.items())


def memory(pipe):
    """Bytes of all weights and buffers, each storage counted once."""
    tensors = [t for name in STAGES for t in (*getattr(pipe, name).parameters(), *getattr(pipe, name).buffers())]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


# Loading -------------------------------------------------------------------------------------------------------------


def test_weights_are_float32_by_default_whatever_the_files_hold(saved):
    for options, expected in (({}, torch.float32), ({"dtype": "auto"}, torch.float16)):
        pipe = load(saved, **options)
        assert {part.dtype for part in (pipe.transformer, pipe.iterative_sr_transformer, pipe.vqvae)} == {expected}
    mixed = load(saved, dtype={"transformer": torch.bfloat16, "default": torch.float16})
    assert (mixed.transformer.dtype, mixed.vqvae.dtype) == (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("options", [{}, {"device_map": "cpu"}, {"dtype": torch.bfloat16}])
def test_a_shared_backbone_is_in_memory_once_after_loading_and_moving(saved, options):
    pipe = load(saved, **options)
    assert_backbone_is_held_once(pipe)
    expected = sum(p.nbytes for p in pipe.transformer.parameters())
    expected += sum(p.nbytes for name, p in pipe.direct_sr_transformer.named_parameters() if "canvas_" in name)
    expected += sum(p.nbytes for p in pipe.iterative_sr_transformer.parameters())
    assert memory(pipe) == expected
    pipe.to(torch.float64)
    assert_backbone_is_held_once(pipe)
    assert memory(pipe) == expected * 8 // options.get("dtype", torch.float32).itemsize


def test_saving_leaves_the_shared_backbone_in_place_and_out_of_the_files(saved, tmp_path):
    pipe = load(saved)
    pipe.save_pretrained(tmp_path / "again")
    assert_backbone_is_held_once(pipe)
    size = (tmp_path / "again" / "direct_sr_transformer" / "model.safetensors").stat().st_size
    own = sum(p.nbytes for name, p in pipe.direct_sr_transformer.named_parameters() if "canvas_" in name)
    assert own <= size < own + 8192
    assert torch.equal(picture(load(tmp_path / "again")), picture(pipe))


# Offload -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CogView2Pipeline, CogView2InpaintPipeline, CogView2UpscalePipeline])
@pytest.mark.parametrize("way", ["model", "sequential", "block_level", "leaf_level"])
def test_offloaded_pipelines_make_the_same_pictures(shared_pipe, kind, way):
    pipe = copy_of(shared_pipe, kind)
    expected = use(pipe)
    offload(pipe, way, "cpu")
    assert use(pipe) == expected
    assert use(pipe) == expected


@pytest.mark.parametrize("way", ["model", "sequential", "block_level", "leaf_level"])
def test_offloaded_captions_are_the_same(shared_pipe, way):
    pipe = copy_of(shared_pipe, CogView2CaptionPipeline)
    expected = use(pipe)
    offload(pipe, way, "cpu")
    assert use(pipe) == expected


def offload(pipe, way, device):
    if way == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif way == "sequential" and device == "cpu":
        # `enable_sequential_cpu_offload` names the device cpu:0, with which accelerate loses the class of parameters
        for name in set(STAGES) & set(pipe.components):
            accelerate.cpu_offload(getattr(pipe, name), torch.device("cpu"))
    elif way == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.enable_group_offload(torch.device(device), offload_type=way, num_blocks_per_group=1)


def test_sequential_offload_keeps_no_weights_in_the_models(shared_pipe):
    pipe = copy_of(shared_pipe)
    offload(pipe, "sequential", "cpu")
    devices = {p.device.type for name in STAGES for p in getattr(pipe, name).parameters()}
    assert devices == {"meta"}
    pipe.remove_all_hooks()
    assert_backbone_is_held_once(pipe)


def test_one_stage_at_a_time_is_on_the_device_and_a_shared_backbone_goes_there_once(shared_pipe, monkeypatch):
    pipe = copy_of(shared_pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    hooks = {name: getattr(pipe, name)._hf_hook for name in STAGES}
    assert all(isinstance(hook, StageOffload) for hook in hooks.values())
    moves = []
    names = {id(getattr(pipe, name)): name for name in STAGES}

    def to(module, device):
        moves.append((names[id(module)], str(device)))
        return module

    # On the CPU nothing has to move: let the hooks believe that weights lie elsewhere, and look at what they ask for.
    for hook in hooks.values():
        hook.execution_device = torch.device("meta")
        monkeypatch.setattr(hook, "models", [getattr(pipe, name) for name in STAGES])
    for name in STAGES:
        monkeypatch.setattr(getattr(pipe, name), "to", to.__get__(getattr(pipe, name)))
    for name in STAGES:
        hooks[name].pre_forward(getattr(pipe, name))
    assert moves == [
        ("iterative_sr_transformer", "cpu"),
        ("transformer", "meta"),
        ("iterative_sr_transformer", "cpu"),
        ("direct_sr_transformer", "meta"),
        ("transformer", "cpu"),
        ("direct_sr_transformer", "cpu"),
        ("iterative_sr_transformer", "meta"),
    ]


def test_hooks_are_put_back_after_a_call_that_fails(shared_pipe):
    pipe = copy_of(shared_pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    expected = picture(pipe)

    def stop(pipe, step, timestep, kwargs):
        raise KeyError("stop")

    with pytest.raises(KeyError):
        picture(pipe, callback_on_step_end=stop)
    assert isinstance(pipe.transformer._hf_hook, StageOffload)
    assert torch.equal(picture(pipe), expected)


def test_group_offload_to_disk_is_refused_because_stages_would_mix_up(shared_pipe, tmp_path):
    with pytest.raises(ValueError, match="`offload_to_disk_path` must be left out"):
        shared_pipe.enable_group_offload("cpu", offload_to_disk_path=str(tmp_path))


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["model", "sequential", "block_level", "leaf_level"])
def test_offloading_to_a_gpu_changes_no_token(saved, way):
    whole = picture(load(saved, device_map="cuda"))
    pipe = load(saved)
    offload(pipe, way, "cuda")
    assert torch.equal(picture(pipe), whole)
    assert {p.device.type for name in STAGES for p in getattr(pipe, name).parameters()} <= {"cpu", "meta"}


@pytest.mark.gpu
def test_stages_may_be_on_different_devices(saved):
    pipe = load(saved)
    expected = picture(pipe)
    pipe.iterative_sr_transformer.to("cuda")
    assert torch.equal(picture(pipe).cpu(), expected)


# Leaks ---------------------------------------------------------------------------------------------------------------


def living_tensors():
    gc.collect()
    return [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]


def test_two_hundred_calls_leave_neither_a_tensor_nor_memory_behind(shared_pipe):
    image, mask = Image.effect_noise((LOW, LOW), 50).convert("RGB"), Image.new("L", (LOW, LOW))
    mask.paste(255, (8, 8, 24, 24))
    inpaint = CogView2InpaintPipeline.from_pipe(shared_pipe)
    upscale, caption = CogView2UpscalePipeline.from_pipe(shared_pipe), CogView2CaptionPipeline.from_pipe(shared_pipe)
    for pipe in (inpaint, upscale, caption):
        pipe.set_progress_bar_config(disable=True)
    calls = (
        lambda: picture(shared_pipe, num_lopar_steps=1, return_statistics=True),
        lambda: inpaint(PROMPT, image, mask, num_lopar_steps=1),
        lambda: upscale(image, num_lopar_steps=1),
        lambda: caption(image, max_length=4),
    )
    for _ in range(5):  # what is made once, such as buffers and threads
        for call in calls:
            call()
    # of other tests, some may go meanwhile
    before = {id(tensor): weakref.ref(tensor) for tensor in living_tensors()}
    memory = resident_bytes()
    for _ in range(50):
        for call in calls:
            call()
    new = [tensor for tensor in living_tensors() if id(tensor) not in before or before[id(tensor)]() is not tensor]
    assert not new
    assert resident_bytes() - memory < 2**24


def resident_bytes():
    """What this process holds of memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


# Batch sizes ---------------------------------------------------------------------------------------------------------


def test_as_many_pictures_fit_as_the_free_memory_says(monkeypatch):
    model = make_coglm()
    each = 1000
    device = torch.device("cuda")
    for free, copies, expected in ((0, 1, 1), (10 * each, 1, 8), (10 * each, 2, 4), (10**6 * each, 1, 32)):
        free += LOGITS * LOGITS_BYTES
        monkeypatch.setattr("cogview_pipelines.pipelines.common.memory.free_memory", lambda device, free=free: free)
        assert pictures_that_fit(model, device, [model], copies * each, 32) == expected


def test_the_weights_that_hooks_bring_and_send_away_count(monkeypatch, shared_pipe):
    pipe = copy_of(shared_pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    model, others = pipe.iterative_sr_transformer, sum(p.nbytes for p in pipe.direct_sr_transformer.parameters())
    each = 1000
    weights = sum(p.nbytes for p in model.parameters())
    room = 31 * each // 5
    free = weights + room + LOGITS * LOGITS_BYTES
    monkeypatch.setattr("cogview_pipelines.pipelines.common.memory.free_memory", lambda device: free)
    models = [getattr(pipe, name) for name in STAGES]
    assert (
        pictures_that_fit(model, torch.device("meta"), models, each, 100) == 4
    )  # nothing is there, and the weights are to come
    room += weights + others  # all is there, and the other stages leave
    assert pictures_that_fit(model, torch.device("cpu"), models, each, 10**6) == int(0.8 * room) // each > 4
