"""What communicators and contexts take is given back, on GPUs and host; memory that no peer can map."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from gpu_common import synchronize  # noqa: E402

import tp_rs  # noqa: E402

HERE = Path(__file__).parent
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 512,
}


def free(gpus):
    """Bytes that are free on each GPU, without what torch keeps."""
    gc.collect()
    synchronize()
    torch.cuda.empty_cache()
    torch._C._host_emptyCache()  # noqa: SLF001  torch keeps pinned memory too
    return [torch.cuda.mem_get_info(index)[0] for index in range(gpus)]


def host():
    """Bytes of address space and of memory that this process has."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return [int(fields[name].split()[0]) * 1024 for name in ("VmSize", "VmRSS")]


def check_lives(live, gpus, lives):
    for _ in range(3):
        live()
    before, host_before = free(gpus), host()
    for _ in range(lives):
        live()
    after, host_after = free(gpus), host()
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        assert new >= old, f"{old - new} bytes of cuda:{index} are gone"
    # A life that stages takes 16 MiB of pinned memory; what allocators keep for each of many is far less.
    grown = [new - old for old, new in zip(host_before, host_after, strict=True)]
    assert max(grown) < max(lives, 64) << 20, f"{grown} bytes of the host's address space and memory are gone"


@pytest.mark.parametrize("peers", ["proved", "staged"])
def test_nothing_is_lost_over_many_lives(place, peers):
    def live():
        comm = place.make(3, peers=peers)
        tensors = [torch.ones(300000, device=place.on(rank)) for rank in range(3)]
        comm.all_reduce(tensors)
        comm.wait()
        del comm, tensors

    check_lives(live, place.gpus, 100)


def test_nothing_is_lost_where_kernels_still_wait(place):
    def live():
        comm = place.make(2, timeout=60)
        with torch.cuda.stream(stream):
            comm.rank(1).all_reduce(tensor)
        del comm

    stream = torch.cuda.Stream(place.on(1))
    tensor = torch.ones(1000, device=place.on(1))
    synchronize()
    check_lives(live, place.gpus, 30)


def test_unload_gives_all_back(place):
    splits = {"kv": [3, 0, 1], "id": [1024, 256, 768], "vc": [16000, 16000, 0], "rs": [512, 128, 128]}

    def live():
        context = tp_rs.TPContext(
            MODEL, [4.0, 4.0, 4.0], devices=place.devices(3), splits=splits, context=512, force=True
        )
        context.finalize()
        context.begin_scratch_alloc_tp()
        context.get_scratch_slice_tp(16, torch.float16, tp_rs.BROADCAST_ID)
        whole = torch.ones(2, 768, dtype=torch.float16)
        copies = context.broadcast(0, whole, tp_rs.BROADCAST_RS)
        context.all_reduce(copies)
        context.wait_streams()
        context.unload()

    check_lives(live, place.gpus, 20)


@pytest.mark.parametrize("setting", ["expandable_segments:True", "backend:cudaMallocAsync"])
def test_memory_that_peers_cannot_map(setting):
    """The allocator is chosen when torch starts, so a small set of tests runs in another process."""
    names = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
    if any(os.environ.get(name) for name in names):
        pytest.skip("this process has an allocator chosen already")
    environment = {**os.environ, **dict.fromkeys(names, setting)}
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider"]
    command += ["-c", str(HERE / "pytest.ini"), "--rootdir", str(HERE), "--confcutdir", str(HERE)]
    command += [str(HERE / "test_small_set.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
