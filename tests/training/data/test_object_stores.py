"""Token shards on an object store: fetched whole or not at all, into a cache that keeps its bound."""

import dataclasses
import functools
import http.server
import io
import logging
import multiprocessing
import os
import pathlib
import threading
import time

import fsspec
import numpy as np
import pytest
import torch
from filelock import FileLock

from cogview_pipelines.training.data import object_stores as module
from cogview_pipelines.training.data.shards import DamagedShard, TokenShards, find_damaged, write_index, write_shard
from cogview_pipelines.training.data.tokens import TokenData, TokenTrainConfig

from ...utils import NUM_IMAGE_TOKENS

NUM_SHARDS, COUNT = 6, 5


def tokens(number):
    return {"low": np.random.default_rng(number).integers(0, NUM_IMAGE_TOKENS, (COUNT, 4, 4))}


@pytest.fixture
def local(tmp_path):
    """Thirty pictures in six shards."""
    folder = tmp_path / "shards"
    for number in range(NUM_SHARDS):
        rows = [{"en": f"picture {COUNT * number + each}"} for each in range(COUNT)]
        write_shard(folder, number, tokens(number), rows, made_of={}, num_codes=NUM_IMAGE_TOKENS)
    write_index(folder, NUM_SHARDS)
    return folder


@pytest.fixture
def url(local, tmp_path):
    """The same on a store in memory."""
    filesystem, url = fsspec.filesystem("memory"), f"memory://{tmp_path.name}/shards"
    for path in local.iterdir():
        filesystem.pipe_file(f"/{tmp_path.name}/shards/{path.name}", path.read_bytes())
    yield url
    filesystem.rm(f"/{tmp_path.name}", recursive=True)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(module.time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01)))


def held(cache):
    return sum(path.stat().st_size for path in cache.iterdir() if path.suffix in (".shard", ".partial"))


def largest(local):
    return max(path.stat().st_size for path in local.glob("*.safetensors"))


def read_all(shards):
    order = np.random.default_rng(0).permutation(NUM_SHARDS * COUNT).tolist()
    expected = np.concatenate([tokens(number)["low"] for number in range(NUM_SHARDS)])
    assert (shards.tokens("low", order) == expected[order]).all()
    assert [shards.texts(each)["captions"]["en"] for each in order] == [[f"picture {each}"] for each in order]


def test_a_store_is_read_as_a_folder_is_and_each_shard_is_fetched_once(url, local, cache, tokenizer, monkeypatch):
    opened = []
    fetch = module.ObjectStore.open
    monkeypatch.setattr(module.ObjectStore, "open", lambda self, name: (opened.append(name), fetch(self, name))[1])
    config = TokenTrainConfig(output_dir="none", data=url, tokenizer="none", data_cache=str(cache))
    data = config.load_data(tokenizer)
    assert not opened and len(data) == 30  # the index alone
    plain = TokenData.load(local, tokenizer)
    assert torch.equal(data.low[:], plain.low[:]) and data.captions[:] == plain.captions[:]
    read_all(TokenShards(url, cache=cache))
    assert sorted(opened) == sorted(path.name for path in local.glob("*.safetensors"))


def test_the_cache_keeps_its_bound_and_says_that_it_is_too_small(url, local, cache, monkeypatch, caplog):
    bound, most = int(2.5 * largest(local)), []
    copy = module.ShardCache._copy

    def watched(self, *args):
        most.append(held(cache))
        return copy(self, *args)

    monkeypatch.setattr(module.ShardCache, "_copy", watched)
    with caplog.at_level(logging.WARNING):
        shards = TokenShards(url, cache=cache, cache_gb=bound / 1e9)
    assert "fetched again and again" in caplog.text
    read_all(shards)
    assert len(most) > NUM_SHARDS and max(most) <= bound and held(cache) <= bound
    with pytest.raises(ValueError, match="`data_cache_gb` must have room for a shard, but is"):
        TokenShards(url, cache=cache, cache_gb=(largest(local) - 1) / 1e9).tokens("low", range(30))


def test_what_was_used_last_stays(url, local, cache):
    bound = int(2.5 * largest(local)) / 1e9
    for number, gone in ((0, None), (1, None), (0, None), (2, 1)):
        before = set(cache.glob("*.shard")) if cache.exists() else set()
        TokenShards(url, cache=cache, cache_gb=bound).tokens("low", [COUNT * number])
        time.sleep(0.02)
        assert len(before - set(cache.glob("*.shard"))) == (gone is not None)
    kept = [path.read_bytes() for path in cache.glob("*.shard")]
    assert sorted(kept) == sorted((local / f"{number:05d}.safetensors").read_bytes() for number in (0, 2))


class Broken(io.BytesIO):
    """A download whose connection breaks."""

    def read(self, size=-1):
        raise TimeoutError("no answer")


DAMAGES = {
    "cut off": lambda content: io.BytesIO(content[:-7]),
    "too long": lambda content: io.BytesIO(content + b"more"),
    "one bit": lambda content: io.BytesIO(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]),
    "broken": Broken,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_shard_that_is_damaged_on_the_way_is_fetched_anew(url, cache, monkeypatch, damage):
    fetch, seen = module.ObjectStore.open, set()

    def once_damaged(self, name):
        content = fetch(self, name).read()
        first, _ = name not in seen, seen.add(name)
        return DAMAGES[damage](content) if first else io.BytesIO(content)

    monkeypatch.setattr(module.ObjectStore, "open", once_damaged)
    read_all(TokenShards(url, cache=cache))
    assert len(seen) == NUM_SHARDS and not list(cache.glob("*.partial"))


@pytest.mark.parametrize("damage", DAMAGES)
def test_one_that_never_comes_whole_is_named_with_the_way_to_leave_it_out(url, cache, tokenizer, monkeypatch, damage):
    fetch = module.ObjectStore.open

    def damaged(self, name):
        file = fetch(self, name)
        return DAMAGES[damage](file.read()) if name == "00003.safetensors" else file

    monkeypatch.setattr(module.ObjectStore, "open", damaged)
    with pytest.raises(DamagedShard, match=rf"00003\.safetensors cannot be fetched .*excluded_shards {url}/00003"):
        read_all(TokenShards(url, cache=cache))
    assert not list(cache.glob("*.partial"))
    config = TokenTrainConfig(
        output_dir="none",
        data=url,
        tokenizer="none",
        data_cache=str(cache),
        excluded_shards=[f"{url}/00003.safetensors"],
    )
    assert len(config.load_data(tokenizer)) == 25


def test_what_is_missing_or_of_another_size_at_the_store_is_left_out_and_noted(url, cache, tokenizer, caplog):
    filesystem, root = fsspec.core.url_to_fs(url)
    filesystem.rm_file(f"{root}/00001.safetensors")
    filesystem.pipe_file(f"{root}/00004.safetensors", b"short")
    content = filesystem.cat_file(f"{root}/00002.safetensors")
    filesystem.pipe_file(f"{root}/00002.safetensors", content[:-1] + bytes([content[-1] ^ 1]))
    assert sorted(find_damaged(url)) == ["00001.safetensors", "00004.safetensors"]
    config = TokenTrainConfig(output_dir="none", data=url, tokenizer="none", data_cache=str(cache), verify_data=True)
    with caplog.at_level(logging.WARNING):
        data = config.load_data(tokenizer)
    assert len(data) == 15 and f"{url}/00001.safetensors is left out: it is missing" in caplog.text
    assert dataclasses.asdict(config)["excluded_shards"] == [f"{url}/0000{number}.safetensors" for number in (1, 2, 4)]
    assert data.low[:].shape == (15, 4, 4)


@pytest.mark.parametrize(
    "url, message",
    [
        ("nothing://here/shards", "`data` nothing://here/shards cannot be opened: Protocol not known"),
        ("memory://nobody/shards", r"`data` memory://nobody/shards has no index\.json that can be read"),
    ],
)
def test_a_store_that_cannot_be_read_is_named(url, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        TokenData.load(url, tokenizer)


def test_a_file_that_a_dead_process_left_makes_room_and_one_that_is_being_fetched_does_not(
    url, local, cache, monkeypatch
):
    bound = int(1.5 * largest(local)) / 1e9
    (cache / "locks").mkdir(parents=True)
    (cache / "left.partial").write_bytes(bytes(largest(local)))
    TokenShards(url, cache=cache, cache_gb=bound).tokens("low", [0])
    assert not (cache / "left.partial").exists()
    monkeypatch.setattr(module, "_MOST_SECONDS", 0)
    with FileLock(cache / "locks" / "busy"):
        (cache / "busy.partial").write_bytes(bytes(largest(local)))
        with pytest.raises(DamagedShard, match=r"`data_cache_gb` .* has no room"):
            TokenShards(url, cache=cache, cache_gb=bound).tokens("low", [7])
        assert (cache / "busy.partial").exists()


class WebServer(http.server.ThreadingHTTPServer):
    """
    A web server on loopback that serves a folder, without ranges of bytes; what was asked for is in `asked`.

    Of names in `cut` the first answer breaks off in the middle.
    """

    def __init__(self, folder):
        self.asked, self.cut = [], set()
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=folder))

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/"


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.asked.append(name)
        if name not in self.server.cut:
            return super().do_GET()
        self.server.cut.remove(name)
        content = (pathlib.Path(self.directory) / name).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.close_connection = True
        return None


@pytest.fixture
def web(local):
    pytest.importorskip("aiohttp")
    server = WebServer(local)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_a_web_server_is_read_as_a_folder_is_and_the_cache_keeps_its_bound(web, local, cache, tokenizer, monkeypatch):
    config = TokenTrainConfig(output_dir="none", data=web.url, tokenizer="none", data_cache=str(cache))
    data, plain = config.load_data(tokenizer), TokenData.load(local, tokenizer)
    assert set(web.asked) == {"index.json"}
    assert torch.equal(data.low[:], plain.low[:]) and data.captions[:] == plain.captions[:]
    names = sorted(path.name for path in local.glob("*.safetensors"))
    assert sorted(name for name in web.asked if name != "index.json") == names
    bound, most = int(2.5 * largest(local)), []
    copy = module.ShardCache._copy
    monkeypatch.setattr(
        module.ShardCache, "_copy", lambda self, *args: (most.append(held(self.folder)), copy(self, *args))[1]
    )
    web.asked.clear()
    small = cache.with_name("small")
    read_all(TokenShards(web.url, cache=small, cache_gb=bound / 1e9))
    assert len(most) == len(web.asked) - 1 > NUM_SHARDS and max(most) <= bound and held(small) <= bound


def test_an_answer_that_breaks_off_is_asked_for_again_and_what_a_web_server_lacks_is_named(
    web, local, cache, tokenizer
):
    web.cut = {"00001.safetensors", "00004.safetensors"}
    read_all(TokenShards(web.url, cache=cache))
    assert not web.cut and web.asked.count("00004.safetensors") == 2 and web.asked.count("00000.safetensors") == 1
    (local / "00002.safetensors").unlink()
    for path in cache.glob("*.shard"):
        path.unlink()
    with pytest.raises(DamagedShard, match=r"00002\.safetensors cannot be fetched .*tried 3 times.*--excluded_shards"):
        read_all(TokenShards(web.url, cache=cache))
    web.shutdown()
    web.server_close()
    with pytest.raises(ValueError, match=r"`data` http://127\.0\.0\.1:\d+/ has no index\.json that can be read"):
        TokenData.load(web.url, tokenizer)


def _read_in_process(url, cache, gigabytes):
    for _ in range(3):
        read_all(TokenShards(url, cache=cache, cache_gb=gigabytes))
    os._exit(0)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_processes_share_a_cache_that_is_smaller_than_the_data(local, cache):
    bound = int(2.5 * largest(local))
    context = multiprocessing.get_context("fork")
    options = (f"file://{local}", cache, bound / 1e9)
    processes = [context.Process(target=_read_in_process, args=options) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert held(cache) <= bound and not list(cache.glob("*.partial"))
