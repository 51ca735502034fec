"""`TPContext` whose ranks are on GPUs, against slices and sums made by torch on the host."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from gpu_common import bits, random_tensor, seed, summed  # noqa: E402

import tp_rs  # noqa: E402

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
    "rope_theta": 10000.0,
}
SPLITS = {"kv": [3, 0, 1], "id": [1024, 256, 768], "vc": [16000, 16000, 0], "rs": [512, 128, 128]}
KINDS = [
    tp_rs.BROADCAST_KV,
    tp_rs.BROADCAST_ID,
    tp_rs.BROADCAST_VC,
    tp_rs.BROADCAST_RS,
    tp_rs.BROADCAST_Q,
]


def make(place, **options):
    return tp_rs.TPContext(
        MODEL, [4.0, 4.0, 4.0], devices=place.devices(3), splits=SPLITS, context=512, force=True, **options
    )


@pytest.fixture(params=["proved", "staged"])
def ctx(place, request):
    with make(place, peers=request.param) as context:
        yield context


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_broadcast_gather_and_allgather(place, ctx, kind, dtype):
    split = ctx.get_split(kind)
    dim = 64 if kind in {tp_rs.BROADCAST_KV, tp_rs.BROADCAST_Q} else 1
    width = split[-1][2] * dim
    whole = random_tensor((3, width), dtype, seed())
    for source in (whole, whole.pin_memory(), whole.to(place.on(1)), ctx.copy_pinned(0, whole)):
        copies = ctx.broadcast(0, source, kind, dim)
        ctx.wait_streams()
        assert [str(copy.device) for copy in copies] == [place.on(rank) for rank, _, _ in split]
        assert all(torch.equal(bits(copy), bits(whole)) for copy in copies)
    parts = place.deal([whole[:, a * dim : b * dim].contiguous() for _, a, b in split], split)
    gathered = ctx.gather(1, parts, kind, dim)
    assert gathered.is_pinned()
    assert torch.equal(bits(gathered), bits(whole))
    later = ctx.gather(1, parts, kind, dim, non_blocking=True)
    ctx.wait_streams()
    assert torch.equal(bits(later), bits(whole))
    for target in KINDS:
        everywhere = ctx.allgather(1, parts, kind, target, dim)
        ctx.wait_streams()
        assert [str(full.device) for full in everywhere] == [
            place.on(rank) for rank, _, _ in ctx.get_split(target)
        ]
        assert all(torch.equal(bits(full), bits(whole)) for full in everywhere)


def test_sums(place, ctx):
    parts = [random_tensor((5, 768), torch.float16, seed()) for _ in range(3)]
    tensors = place.put(parts)
    assert ctx.all_reduce(tensors) is tensors
    scattered = ctx.reduce_scatter(place.put(parts), tp_rs.BROADCAST_RS)
    targets = [torch.zeros_like(part) for part in scattered]
    ctx.add_residual(targets, tensors, tp_rs.BROADCAST_RS)
    ctx.wait_streams()
    expected = summed(parts)
    assert all(torch.equal(bits(tensor), bits(expected)) for tensor in tensors)
    for (_, a, b), part, target in zip(ctx.rs_split, scattered, targets, strict=True):
        assert torch.equal(bits(part), bits(expected[:, a:b]))
        assert torch.equal(bits(target), bits(expected[:, a:b]))


def test_scratch_and_tables_are_on_the_gpu(place, ctx):
    ctx.begin_scratch_alloc_tp()
    devices = [place.on(rank) for rank, _, _ in ctx.id_split]
    for tensors in (
        ctx.get_scratch_slice_tp(4, torch.float16, tp_rs.BROADCAST_ID),
        ctx.get_scratch_slice_tp_bc(4, torch.float16, tp_rs.BROADCAST_ID),
        ctx.get_temp_tensors(4, torch.float16, tp_rs.BROADCAST_ID),
    ):
        assert [str(tensor.device) for tensor in tensors] == devices
        assert all(tensor.data_ptr() % 256 == 0 for tensor in tensors)
    sin, cos = ctx.get_sin_cos()
    for rank in ctx.all_devs:
        assert str(sin[rank].device) == str(cos[rank].device) == place.on(rank)
        angles = torch.asin(sin[rank].double().cpu()[0, 0, 1])
        assert abs(float(angles[0]) - 1.0) < 2e-3


def test_own_streams_do_the_work_and_are_torchs_too(place):
    with make(place, streams="own") as ctx:
        streams = ctx.torch_streams
        assert [stream.cuda_stream for stream in streams] == ctx.streams
        assert len(set(ctx.streams)) == 3
        parts = [random_tensor((1, 768), torch.float16, seed()) for _ in range(3)]
        tensors = place.put(parts)
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        ctx.all_reduce(tensors)
        for stream in streams:
            torch.cuda.current_stream(stream.device).wait_stream(stream)
        assert all(torch.equal(bits(tensor), bits(summed(parts))) for tensor in tensors)


def test_use_after_unload_is_an_error_and_memory_comes_back(place):
    context = make(place)
    context.finalize()
    context.unload()
    context.unload()
    with pytest.raises(tp_rs.TPError, match="unloaded"):
        context.all_reduce([])
    assert context.pinned_temp is None


def test_a_tensor_on_the_wrong_device_is_named(place, ctx):
    with pytest.raises(tp_rs.InvalidInput, match="cuda:0"):
        ctx.all_reduce([torch.zeros(4), *(torch.zeros(4, device=place.on(rank)) for rank in (1, 2))])
