"""Products of one row against float64, and models whose recorded steps use them."""

import random

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("triton")

from models_common import DEVICE, made, uneven, whole  # noqa: E402  they may be missing
from torch import nn  # noqa: E402

from tp_rs.integrations.transformers import load, selfcheck  # noqa: E402
from tp_rs.integrations.transformers.product_kernel import product  # noqa: E402
from tp_rs.integrations.transformers.products import (  # noqa: E402
    OneRow,
    find_stacks,
    multiply,
    one_row_products,
    stacked_products,
)

pytestmark = pytest.mark.filterwarnings("ignore")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ALLOWED = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative to the largest sum of magnitudes: one rounding, and for float32 those of the sum."""


def weights(rows, columns, dtype, *, loose=False):
    """A random weight, if `loose` with rows that lie apart and begin anywhere."""
    if not loose:
        return torch.randn(rows, columns, device=DEVICE, dtype=dtype)
    apart = torch.full((rows, columns + random.randint(2, 9)), float("nan"), device=DEVICE, dtype=dtype)
    apart[:, 1 : columns + 1].normal_()
    return apart[:, 1 : columns + 1]


def close(own, hidden, weight, bias):
    """Whether it is the product, up to rounding."""
    exact = weight.double() @ hidden.double().flatten()
    size = weight.double().abs() @ hidden.double().abs().flatten()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    return bool(((own.double().flatten() - exact).abs() <= ALLOWED[own.dtype] * size.max()).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loose", [False, True], ids=["dense", "loose"])
def test_products_are_those_of_float64(dtype, loose):
    sizes = [(1, 1), (512, 4096), (4096, 2048), (300, 14336)]
    sizes += [(random.randint(1, 3000), random.randint(1, 6000)) for _ in range(8)]
    for rows, columns in sizes:
        weight = weights(rows, columns, dtype, loose=loose)
        bias = random.choice([None, torch.randn(rows, device=DEVICE, dtype=dtype)])
        hidden = torch.randn(1, 1, columns, device=DEVICE, dtype=dtype)
        own = product(hidden, weight, bias)
        assert own.shape == (1, 1, rows)
        assert own.dtype == dtype
        assert close(own, hidden, weight, bias), (rows, columns, bias is not None)


def test_infinities_and_nan_are_kept():
    weight = torch.ones(3, 100, device=DEVICE, dtype=torch.float16)
    weight[0, 5], weight[1, 6] = float("inf"), float("nan")
    own = product(torch.ones(1, 100, device=DEVICE, dtype=torch.float16), weight, None).flatten().tolist()
    assert own[0] == float("inf")
    assert own[1] != own[1]
    assert own[2] == 100


def test_each_waits_for_the_one_before():
    """A product begins before the last one has ended; what it reads must be there all the same."""
    size, layers = 2048, 24
    chain = [weights(size, size, torch.float16) / size**0.5 for _ in range(layers)]
    start = torch.randn(1, size, device=DEVICE, dtype=torch.float16)

    def run():
        hidden = start
        for weight in chain:
            hidden = product(hidden, weight, None)
        return hidden

    # Each is waited for.
    expected = start
    for weight in chain:
        expected = product(expected, weight, None)
        torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = run()
        for _ in range(50):
            result.fill_(float("nan"))
            graph.replay()
            stream.synchronize()
            assert torch.equal(result, expected)


def test_only_one_row_is_ours_and_layers_are_themselves_afterwards():
    layer = nn.Linear(64, 32, device=DEVICE, dtype=torch.float16)
    on_the_host = nn.Linear(8, 8)
    one, three = (torch.randn(rows, 64, device=DEVICE, dtype=torch.float16) for rows in (1, 3))
    with torch.inference_mode(), one_row_products([layer, on_the_host]):
        assert type(layer) is OneRow
        assert type(on_the_host) is nn.Linear
        assert torch.equal(layer(one), product(one, layer.weight, layer.bias))
        assert torch.equal(layer(three), nn.functional.linear(three, layer.weight, layer.bias))
        assert torch.equal(multiply(layer, one), layer(one))
    assert type(layer) is nn.Linear
    with pytest.raises(RuntimeError), one_row_products([layer]):
        layer(one[:, 1:])
    assert type(layer) is nn.Linear


@pytest.mark.parametrize(
    ("dtype", "compiled", "kv"),
    [
        (torch.float16, False, [3]),
        (torch.bfloat16, False, [2, 1]),
        (torch.float16, True, [2, 1]),
    ],
    ids=str,
)
def test_steps_in_half_precision_agree_with_the_whole_model(dtype, compiled, kv, place):
    """Logits after each token, against the unsharded model in float32 from the same weights."""
    model = made("llama").to(dtype)
    unsharded = whole(model).float()
    front = load(model, plan=uneven(model, kv), devices=place.devices(len(kv)), check=False, compile=compiled)
    try:
        ids, _ = (tensor[:1].to(DEVICE) for tensor in selfcheck.prompt(model))
        steps = front.tp_rs_runner.capture.ready(1, 64)
        steps.prefill([ids[0].cpu()], [0])
        for length in range(ids.shape[1], ids.shape[1] + 6):
            exact = unsharded(ids).logits[:, -1]
            own = steps.logits(1).clone()
            allowed = (0.02 if dtype is torch.float16 else 0.1) * exact.abs().max()
            assert (own.to(DEVICE) - exact).abs().max() <= allowed, length
            token = torch.randint(3, 90, (1, 1), device=DEVICE)
            steps.decode(token, [length])
            ids = torch.cat([ids, token], dim=1)
        assert not steps.failures
    finally:
        front.unload()


@pytest.mark.parametrize(("architecture", "dtype"), [("llama", torch.float16), ("qwen2", torch.float32)])
def test_loaded_layers_of_one_input_are_one_product(architecture, dtype, place):
    model = made(architecture).to(dtype)
    front = load(model, plan=uneven(model, [2, 1]), devices=place.devices(2), check=False)
    try:
        for rank in front.tp_rs_runner.models:
            stacks = find_stacks(rank)
            # Queries, keys and values; gate and up.
            assert sorted(len(stack.modules) for stack in stacks) == [2] * 4 + [3] * 4
            for stack in stacks:
                device = stack.weight.device
                for rows in (1, 5):
                    hidden = torch.randn(rows, stack.weight.shape[1], device=device, dtype=dtype)
                    with torch.inference_mode(), torch.cuda.device(device), stacked_products([stack], rows):
                        own = [module(hidden) for module in stack.modules]
                    for part, module in zip(own, stack.modules, strict=True):
                        for got, given in zip(part, hidden, strict=True):
                            assert close(got, given, module.weight, module.bias)
                assert not stack.apart
    finally:
        front.unload()
