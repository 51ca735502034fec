"""A few of everything, quick enough to run under compute-sanitizer."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from gpu_common import PEERS, bits, random_tensor, seed, split_of, summed  # noqa: E402


@pytest.mark.parametrize("peers", PEERS)
@pytest.mark.parametrize("elements", [1, 1001, 300001])
def test_every_operation_once(place, peers, elements):
    comm = place.make(2, peers=peers)
    parts = [random_tensor((2, elements), torch.float16, seed()) for _ in range(2)]
    tensors = place.put(parts)
    comm.all_reduce(tensors)
    comm.wait()
    assert all(torch.equal(bits(tensor), bits(summed(parts))) for tensor in tensors)

    split = split_of((elements, 2 * elements))
    whole = random_tensor((3, 3 * elements), torch.bfloat16, seed())
    pieces = place.deal([whole[:, a:b].contiguous() for _, a, b in split], split)
    targets = [torch.zeros_like(whole, device=place.on(rank)) for rank in range(2)]
    comm.all_gather(pieces, split, targets)
    comm.wait()
    assert all(torch.equal(bits(target), bits(whole)) for target in targets)
    host = torch.zeros_like(whole).pin_memory()
    comm.gather(pieces, split, host)
    assert torch.equal(bits(host), bits(whole))
    outputs = [torch.zeros_like(piece) for piece in pieces]
    comm.reduce_scatter(targets, outputs, split)
    comm.wait()
    doubled = summed([whole, whole])
    assert all(
        torch.equal(bits(out), bits(doubled[:, a:b])) for out, (_, a, b) in zip(outputs, split, strict=True)
    )
    comm.broadcast(whole, targets)
    comm.add_residual(pieces, targets, split)
    comm.wait()
    assert all(
        torch.equal(bits(piece), bits(doubled[:, a:b]))
        for piece, (_, a, b) in zip(pieces, split, strict=True)
    )
