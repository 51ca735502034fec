"""`tp-rs run` on small random models, against the unsharded model that transformers runs."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

os.environ.setdefault("HF_HUB_OFFLINE", "1")

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers", minversion="5.17")
tokenizers = pytest.importorskip("tokenizers")

from tp_rs.cli import app, generation, run  # noqa: E402
from tp_rs.integrations.transformers import load  # noqa: E402
from tp_rs.integrations.transformers.twin import make_twin, twin_config  # noqa: E402

RUNNER = CliRunner()
COMMAND = [sys.executable, "-m", "tp_rs.cli"]
PROMPT = "w5 w17 w42 w8 w61"
RANKS = ("--gpu-split", "0.5,0.3,0.2", "--kv", "2,1,0")
TEMPLATE = (
    "{% for turn in messages %}w9 {{ turn['content'] }} w10{% endfor %}"
    "{% if add_generation_prompt %} w11{% endif %}"
)

pytestmark = pytest.mark.filterwarnings("ignore:.*")


def checkpoint(folder: Path, **changes: Any) -> Any:
    """A random Llama of 4 layers with 6 query and 3 KV heads of 8, and a tokenizer of its 97 words."""
    model = make_twin(twin_config(transformers.LlamaConfig, changes))
    model.save_pretrained(folder)
    words = {f"w{index}": index for index in range(model.config.vocab_size)}
    special = {"unk_token": "w0"}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, **special))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return checkpoint(folder)


def invoke(folder: Path, *arguments: str) -> Any:
    return RUNNER.invoke(app, ["run", str(folder), *arguments])


def generated(model: Any, tokens: list[int], count: int, **options: Any) -> list[int]:
    ids = torch.tensor([tokens])
    options = {"do_sample": False, "pad_token_id": 0} | options
    result = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options)
    new: list[int] = result[0, ids.shape[1] :].tolist()
    return new


def words(tokens: list[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


def tokens_of(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def test_the_text_is_what_the_unsharded_model_generates(folder: Path, model: Any) -> None:
    done = invoke(folder, "--prompt", PROMPT, *RANKS, "--max-new-tokens", "12")
    assert done.exit_code == 0, done.output
    plan, text, *rest = done.stdout.split("\n\n")[4:]
    assert "fits: rank" in plan
    # Special tokens, here the padding, are not text.
    expected = [token for token in generated(model, tokens_of(PROMPT), 12) if token]
    assert tokens_of(text) == expected
    assert "prefill" in rest[0]
    assert "(11 tokens in" in rest[0]
    assert "\x1b" not in done.output


def test_json_says_everything_and_nothing_else_is_printed(folder: Path, model: Any) -> None:
    done = invoke(folder, "--prompt", PROMPT, *RANKS, "--max-new-tokens", "12", "--json", "--context", "200")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert done.stderr == ""
    assert said["tokens"] == generated(model, tokens_of(PROMPT), 12)
    assert said["prompt_tokens"] == 5
    assert said["check"] is None
    assert not said["interrupted"]
    assert said["plan"]["context"] == 200
    assert said["tokens_per_second"]["decode"] == pytest.approx(11 / said["seconds"]["decode"])
    assert said["tokens_per_second"]["prefill"] == pytest.approx(5 / said["seconds"]["prefill"])
    assert said["process_growth_bytes"] is None or said["process_growth_bytes"] >= 0


def test_bytes_of_the_ranks_are_counted_tensor_by_tensor(folder: Path, model: Any) -> None:
    done = invoke(folder, "--prompt", PROMPT, *RANKS, "--max-new-tokens", "12", "--json")
    ranks = json.loads(done.stdout)["ranks"]
    # Room for 17 tokens, prompt and answer; 4 layers, keys and values of 8 floats a head. A rank without
    # heads keeps one float for each, so that its cache knows how long it is.
    assert [rank["cache_bytes"] for rank in ranks] == [17 * 4 * 2 * 4 * floats for floats in (2 * 8, 8, 1)]
    weights = sum(tensor.numel() * 4 for tensor in model.state_dict().values())
    norms = sum(tensor.numel() * 4 for name, tensor in model.state_dict().items() if "norm" in name)
    held = sum(rank["weight_bytes"] for rank in ranks)
    frequencies = 3 * 2 * 4 * 4  # two tables of half a head a rank, which no checkpoint has
    assert weights + 2 * norms <= held <= weights + 2 * norms + frequencies
    for rank in ranks:
        assert abs(rank["weight_bytes"] - rank["planned_weight_bytes"]) <= frequencies


@pytest.mark.parametrize("chunk", ["2048", "3"])
def test_check_passes_on_a_right_model(folder: Path, model: Any, chunk: str) -> None:
    done = invoke(folder, "--prompt", PROMPT, *RANKS, "--max-new-tokens", "9", "--check", "--chunk", chunk)
    assert done.exit_code == 0, done.output
    assert "check: the unsharded model says the same 9 tokens" in done.stdout
    del model


@pytest.mark.parametrize("factor", [-1.0, 1.01, float("nan")])
def test_check_fails_on_a_model_with_a_wrong_weight(
    folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    def wrong(*args: Any, **kwargs: Any) -> Any:
        front = load(*args, **kwargs)
        front.tp_rs_runner.models[1].model.layers[2].mlp.down_proj.weight.data *= factor
        return front

    monkeypatch.setattr(generation, "load", wrong)
    done = invoke(folder, "--prompt", PROMPT, *RANKS, "--max-new-tokens", "9", "--check", "--json")
    assert done.exit_code == 1
    said = json.loads(done.stdout)["check"]
    assert not said["logits_agree"]
    assert said["unsharded_tokens"] == generated(model, tokens_of(PROMPT), 9)
    done = invoke(folder, "--prompt", PROMPT, *RANKS, "--max-new-tokens", "9", "--check")
    assert done.exit_code == 1
    assert "check FAILED" in " ".join(done.stdout.split())


def test_steps_are_recorded_where_they_can_be(
    folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on GPUs, where nobody asks for them.
    monkeypatch.setattr(generation, "load", partial(load, capture=True))
    arguments = ("--prompt", PROMPT, *RANKS, "--max-new-tokens", "12", "--context", "64", "--check")
    done = invoke(folder, *arguments, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["recorded_steps"] is True
    assert said["tokens"] == generated(model, tokens_of(PROMPT), 12)
    assert said["check"]["agrees"]
    assert said["check"]["compared_tokens"] == 12
    assert said["seconds"]["prefill"] > 0
    for rank in said["ranks"][:2]:
        assert rank["cache_bytes"] == rank["planned_cache_bytes"] > 0
    done = invoke(folder, *arguments)
    assert "the cache of the recorded steps has room for 64 tokens, 16 are in it" in " ".join(
        done.stdout.split()
    )


def test_steps_that_are_given_up_are_not_said_to_have_run(
    folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def giving_up(*args: Any, **kwargs: Any) -> Any:
        front = load(*args, capture=True, **kwargs)
        capture = front.tp_rs_runner.capture
        monkeypatch.setattr(capture, "ready", lambda *_: capture.refuse("a test wants it"))
        return front

    monkeypatch.setattr(generation, "load", giving_up)
    done = invoke(folder, "--prompt", PROMPT, *RANKS, "--max-new-tokens", "12", "--check", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["recorded_steps"] is False
    assert said["tokens"] == generated(model, tokens_of(PROMPT), 12)
    assert said["check"]["agrees"]
    assert [rank["cache_bytes"] for rank in said["ranks"]] == [None] * 3


def test_bfloat16_is_held_in_half_the_bytes(folder: Path, model: Any) -> None:
    weights = []
    for dtype in ("float32", "bfloat16"):
        done = invoke(folder, "--prompt", PROMPT, *RANKS, "--max-new-tokens", "2", "--dtype", dtype, "--json")
        assert done.exit_code == 0, done.output
        said = json.loads(done.stdout)
        weights.append([rank["planned_weight_bytes"] for rank in said["ranks"]])
        size = 4 if dtype == "float32" else 2
        assert said["ranks"][0]["cache_bytes"] == 7 * 4 * 2 * (2 * 8) * size
        assert said["plan"]["cache"] == ("fp32" if dtype == "float32" else "fp16")
    assert weights[0] == [2 * size for size in weights[1]]
    del model


def test_sampling_follows_the_seed(folder: Path, model: Any) -> None:
    options = ("--prompt", PROMPT, *RANKS, "--max-new-tokens", "12", "--temperature", "1.5", "--json")
    seeds = [str(int(torch.randint(1 << 30, ())))] * 2 + ["1"]
    texts = [json.loads(invoke(folder, *options, "--seed", seed).stdout)["tokens"] for seed in seeds]
    assert texts[0] == texts[1]
    torch.manual_seed(int(seeds[0]))
    assert texts[0] == generated(model, tokens_of(PROMPT), 12, do_sample=True, temperature=1.5)


def test_chat_uses_the_tokenizers_template(tmp_path: Path) -> None:
    model = checkpoint(tmp_path)
    done = invoke(tmp_path, "--prompt", PROMPT, *RANKS, "--chat")
    assert done.exit_code == 2
    assert "no chat template" in done.stderr
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    done = invoke(tmp_path, "--prompt", PROMPT, *RANKS, "--chat", "--max-new-tokens", "7", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tokens"] == generated(model, [9, *tokens_of(PROMPT), 10, 11], 7)


def test_what_does_not_fit_is_not_loaded(folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "load", None)
    arguments = ("--prompt", PROMPT, "--gpu-split", "0.0001,0.0001")
    done = invoke(folder, *arguments)
    assert done.exit_code == 1
    assert "does not fit: short by" in done.stdout
    assert done.stderr == ""
    done = invoke(folder, *arguments, "--json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["plan"]["fits"] is False
    del model


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kv", "2,2"], "kv"),
        (["--gpu-split", "1,x"], "--gpu-split[1]"),
        (["--devices", "cpu,npu"], "npu"),
        (["--context", "1000"], "context: got 1000"),
        (
            ["--context", "8", "--max-new-tokens", "4"],
            "--context: got 8 tokens, wanted 9 or more: 5 for the prompt",
        ),
        (["--context", "5"], "--context: got 5 tokens, wanted 6 or more"),
        (["--check", "--dtype", "bfloat16"], "--dtype: got bfloat16 beside --check"),
        (["--check", "--temperature", "1"], "--temperature"),
        (["--seed", "1"], "--seed"),
    ],
)
def test_bad_input_is_exit_code_2_and_one_paragraph(
    folder: Path, model: Any, arguments: list[str], said: str
) -> None:
    done = invoke(folder, "--prompt", PROMPT, "--devices", "cpu,cpu", *arguments)
    assert done.exit_code == 2, done.output
    assert done.stderr.startswith("tp-rs: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    del model


def test_an_empty_prompt_and_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    model = checkpoint(tmp_path)
    done = invoke(tmp_path, "--prompt", " ", *RANKS)
    assert (done.exit_code, "--prompt: got ' '" in done.stderr) == (2, True)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()
    done = invoke(tmp_path, "--prompt", PROMPT, *RANKS)
    assert (done.exit_code, "no tokenizer in it" in done.stderr) == (2, True)
    del model


def test_a_missing_or_broken_model_is_exit_code_2_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ')
    for path in (tmp_path / "none", tmp_path / "none.gguf", tmp_path):
        done = invoke(path, "--prompt", PROMPT, *RANKS)
        assert done.exit_code == 2, path
        assert done.stderr.startswith("tp-rs: ")
        assert "Traceback" not in done.output
    checkpoint(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    done = invoke(tmp_path, "--prompt", PROMPT, *RANKS)
    assert done.exit_code == 2
    assert done.stderr.startswith("tp-rs: ")
    assert done.stderr.count("\n") == 1


def test_missing_packages_are_named_with_the_command(
    folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "find_spec", lambda _: None)
    done = invoke(folder, "--prompt", PROMPT)
    assert done.exit_code == 2
    assert "pip install torch transformers" in done.stderr
    monkeypatch.setattr(run, "find_spec", lambda name: None if name == "accelerate" else name)
    done = invoke(folder / "model.gguf", "--prompt", PROMPT, "--check")
    assert "not installed, and needed for this: accelerate; pip install accelerate" in done.stderr
    del model


def test_an_error_of_other_code_is_one_sentence(
    folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        message = "the allocator\nis on strike"
        raise RuntimeError(message)

    monkeypatch.setattr(generation, "load", broken)
    done = invoke(folder, "--prompt", PROMPT, *RANKS)
    assert done.exit_code == 2
    assert done.stderr.startswith("tp-rs: RuntimeError: the allocator is on strike")
    del model


def test_a_pipe_gets_plain_text_and_a_terminal_bars(folder: Path, model: Any) -> None:
    arguments = [*COMMAND, "run", str(folder), "--prompt", PROMPT, *RANKS, "--max-new-tokens", "4"]
    env = os.environ | {"COLUMNS": "80", "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    ours, theirs = pty.openpty()
    # Only stderr is the terminal: text that is piped on stays plain beside the bars.
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=theirs, env=env) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # Linux's way of saying that the other end is closed
                break
            if not part:
                break
            shown += part
        assert process.stdout is not None
        text = process.stdout.read()
        assert process.wait(timeout=300) == 0
    os.close(ours)
    for rank in range(3):
        assert f"loading rank {rank} (cpu)".encode() in shown
    assert "━".encode() in shown
    assert b"\x1b" not in text
    del model


def test_ctrl_c_ends_with_what_was_generated(tmp_path: Path) -> None:
    checkpoint(tmp_path, max_position_embeddings=8192)
    arguments = [*COMMAND, "run", str(tmp_path), "--prompt", PROMPT, *RANKS, "--max-new-tokens", "8000"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        assert process.stdout is not None
        before = ""
        while "tokens\n\nw" not in before:
            part = process.stdout.read(1)
            assert part, "the command ended by itself"
            before += part
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert errors == ""
    assert "interrupted: the text above is what had been generated until then" in rest
    assert "decode" in rest
