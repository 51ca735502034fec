"""What a part asks of an upload; the upload itself needs a GPU (tests/python/gpu)."""

import random

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tp_rs.integrations.transformers.mapped import MappedSource
from tp_rs.integrations.transformers.sources import Counter, Part, TensorSource
from tp_rs.integrations.transformers.upload import _BUFFER_BYTES, _pieces


class Recorded:
    """An upload to host memory that keeps what it was asked."""

    def __init__(self):
        self.stays = []
        self.mapped = set()

    def room(self, shape, dtype, *, stays):
        self.stays.append(stays)
        return torch.full(shape, 99, dtype=dtype)

    def put(self, source, target, *, mapped=False):
        self.mapped.add(mapped)
        assert source.shape == target.shape
        assert source.dtype == target.dtype
        target.copy_(source)

    def landed(self, tensor):
        return tensor


def intervals(size):
    cuts = sorted(random.sample(range(size + 1), 4))
    return [(cuts[0], cuts[1]), (cuts[2], cuts[3])]


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, None])
def test_a_part_is_put_where_it_goes(tmp_path, kept):
    tensor = torch.randn(40, 60)
    save_file({"a": tensor}, tmp_path / "a.safetensors")
    with safe_open(str(tmp_path / "a.safetensors"), framework="pt") as file:
        for source, mapped in (
            (TensorSource(tensor), False),
            (MappedSource(file.get_slice("a"), torch.float32), True),
        ):
            for cuts in (
                {},
                {0: intervals(40)},
                {1: intervals(60)},
                {0: intervals(40), 1: intervals(60)},
                {0: []},
            ):
                counter, upload = Counter(), Recorded()
                part = Part(source, cuts, counter, upload=upload, dtype=kept)
                wanted = Part(source, cuts)[...]
                got = part[...]
                assert torch.equal(got, wanted)
                assert counter.bytes == wanted.nbytes
                if wanted.numel():
                    assert upload.stays == [kept is torch.float32]
                    assert upload.mapped == {mapped}


def test_scalars_are_put_too():
    upload = Recorded()
    got = Part(TensorSource(torch.tensor(3.5)), {}, upload=upload, dtype=torch.float32)[...]
    assert got.shape == ()
    assert float(got) == 3.5


@pytest.mark.parametrize(
    "shape", [(1,), (3, 5), (_BUFFER_BYTES // 4 + 7,), (3, _BUFFER_BYTES // 2), (1, 5, 900_000)]
)
def test_pieces_fit_into_buffers_and_are_the_whole(shape):
    source = torch.empty(shape, dtype=torch.float32, device="meta")
    target = torch.zeros(shape, dtype=torch.uint8)
    for own, there in _pieces(source, target):
        assert own.shape == there.shape
        assert own.numel() * own.element_size() <= _BUFFER_BYTES
        there.add_(1)
    assert (target == 1).all()
