"""What a model over ranks refuses: tokens that are none, changes of parameters, calls in a forked process."""

import os
import re
import signal

import pytest
import torch
from architectures import small

from tp_rs.errors import InvalidInput, TPError
from tp_rs.integrations.transformers import Splits, load
from tp_rs.integrations.transformers.twin import make_twin

SPLITS = Splits.of(kv=[2, 1, 0], intermediate=[24, 16, 24], vocabulary=[60, 0, 37], groups=2)


@pytest.fixture(scope="module")
def front():
    front = load(make_twin(small("llama"), seed=5), plan=SPLITS, check=False)
    yield front
    front.unload()


@pytest.mark.parametrize("token", [-1, 97, 2**40])
def test_tokens_that_are_none(front, token):
    ids = torch.tensor([[5, 6, token]])
    wanted = re.escape(f"to {max(6, token)}, wanted 0 to 96")
    with pytest.raises(InvalidInput, match=wanted):
        front(ids)
    with pytest.raises(InvalidInput, match=wanted):
        front(input_ids=ids)
    for call in (front.generate, front.generate_fast):
        with pytest.raises(InvalidInput, match=wanted):
            call(ids, max_new_tokens=3, pad_token_id=0)
    with pytest.raises(InvalidInput, match=wanted):
        front.generate(input_ids=ids, max_new_tokens=3, pad_token_id=0)
    assert front(ids.clamp(0, 96)).logits.shape == (1, 3, 97)
    assert front(inputs_embeds=torch.randn(1, 3, front.config.hidden_size)).logits.shape == (1, 3, 97)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda front: front.half(), "got torch.float16, and the model was loaded as torch.float32"),
        (lambda front: front.bfloat16(), "got torch.bfloat16"),
        (lambda front: front.double(), "got torch.float64"),
        (lambda front: front.to("cpu", torch.float16), "load it with dtype=torch.float16"),
        (lambda front: front.to(dtype=torch.bfloat16), "got torch.bfloat16"),
        (lambda front: front.cuda(), "got cuda, and the ranks are on cpu, cpu, cpu"),
        (lambda front: front.cuda(1), "got cuda:1"),
        (lambda front: front.to("meta"), "got meta"),
        (lambda front: front.save_pretrained("nowhere"), "copy the folder"),
        (lambda front: front.push_to_hub("nobody/nothing"), "upload the folder"),
        (lambda front: front.resize_token_embeddings(200), "transformers' own model"),
    ],
)
def test_changes_of_parameters(front, change, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInput, match=reason):
        change(front)
    assert not list(tmp_path.iterdir())


def test_where_it_is_it_may_stay(front):
    assert front.to("cpu") is front
    assert front.to(torch.float32) is front
    assert front.to(torch.zeros(1)) is front
    assert front.cpu().float().eval() is front


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_has_no_ranks(front):
    ids = torch.tensor([[5, 6, 7]])
    expected = front(ids).logits
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        said = 0
        for call in (front, front.generate, front.generate_fast):
            try:
                call(ids)
            except TPError as error:
                said += "a fork of it" in str(error)
        os._exit(said)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 3
    assert torch.equal(front(ids).logits, expected)
