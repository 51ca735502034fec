"""What a user names, as a configuration, a model class and tensors to read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from tp_rs._native import safetensors_files
from tp_rs.errors import InvalidInput, ModelError, TPError
from tp_rs.integrations.transformers import gguf, quantized
from tp_rs.integrations.transformers.mapped import MappedSource
from tp_rs.integrations.transformers.sources import Source, TensorSource

__all__ = ["Checkpoint", "open_checkpoint"]

_Reader = Callable[[PreTrainedModel], dict[str, Source]]


@dataclass
class Checkpoint:
    """A model that can be loaded in parts."""

    name: str
    config: PretrainedConfig
    kind: type[PreTrainedModel]
    dtype: torch.dtype
    read: _Reader
    """The tensors, given the skeleton."""
    generation: GenerationConfig | None = None
    tokenizer: dict[str, Any] | None = None
    """What `AutoTokenizer.from_pretrained` takes."""
    keep: list[Any] = field(default_factory=list)
    """Open files."""


def open_checkpoint(model: object, dtype: torch.dtype | None = None) -> Checkpoint:
    """Find the configuration and the tensors of a folder, a GGUF file or a transformers model.

    Raises:
        InvalidInput: It is neither of these.
        ModelError: It cannot be run in parts; the message says why.
        FileNotFoundError: The path does not exist.
    """
    if isinstance(model, PreTrainedModel):
        return _from_model(model, dtype)
    if not isinstance(model, (str, PathLike)):
        message = f"model: got {type(model).__name__}, wanted a folder, a GGUF file or a transformers model"
        raise InvalidInput(message)
    path = Path(model)
    if not path.exists():
        message = f"{path} does not exist; download the checkpoint and pass its folder"
        raise FileNotFoundError(message)
    if path.is_file() and path.suffix == ".gguf":
        return _from_gguf(path, dtype)
    folder = path.parent if path.is_file() else path
    files = sorted(folder.glob("*.gguf"))
    if not (folder / "config.json").exists() and len(files) == 1:
        return _from_gguf(files[0], dtype)
    named = path.name.endswith((".safetensors", ".index.json"))
    return _from_folder(folder, dtype, path if named else folder)


def _from_model(model: PreTrainedModel, dtype: torch.dtype | None) -> Checkpoint:
    devices = sorted({str(tensor.device) for tensor in model.state_dict().values()})
    if devices != ["cpu"]:
        message = (
            f"model: its weights are on {', '.join(devices)}, wanted them on the CPU; pass the folder it was "
            "loaded from, which needs no second copy in memory"
        )
        raise InvalidInput(message)
    _check_config(model.config)
    settings = quantized.settings_of(model.config)
    if settings is not None:
        message = (
            f"model: its weights were quantised with {settings['quant_method']} and are in its modules' own "
            "form; pass the folder it was loaded from"
        )
        raise ModelError(message)
    sources: dict[str, Source] = {name: TensorSource(tensor) for name, tensor in model.state_dict().items()}
    return Checkpoint(
        name=type(model).__name__,
        # Building a model of another dtype notes that dtype in its configuration.
        config=copy.deepcopy(model.config),
        kind=type(model),
        dtype=dtype or model.dtype,
        read=lambda _: sources,
        generation=model.generation_config,
    )


def _from_folder(path: Path, dtype: torch.dtype | None, weights: Path) -> Checkpoint:
    """A folder. Its weights are at `weights`: the folder itself, a file in it or an index."""
    if not (path / "config.json").exists():
        message = f"{path}: no config.json and no single .gguf file in it"
        raise ModelError(message)
    with _reading(path, "its configuration"):
        config = AutoConfig.from_pretrained(path)
        settings = quantized.settings_of(config, path)
        if settings is not None:
            quantized.without_settings(config)
        kind = _class_of(config)
        dtype = dtype or _dtype_of(config)
        own_config = _own_config(config, kind)
    kept: list[Any] = []
    generation = None
    if (path / "generation_config.json").exists():
        with _reading(path, "its generation_config.json"):
            generation = GenerationConfig.from_pretrained(path)
    tokenizer = any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))

    def read(_: PreTrainedModel) -> dict[str, Source]:
        sources = _files(path, weights, kept, dtype)
        return sources if settings is None else quantized.decode(sources, settings, dtype, path.name)

    return Checkpoint(
        name=path.name,
        config=own_config,
        kind=kind,
        dtype=dtype,
        read=read,
        generation=generation,
        tokenizer={"pretrained_model_name_or_path": str(path)} if tokenizer else None,
        keep=kept,
    )


def _from_gguf(path: Path, dtype: torch.dtype | None) -> Checkpoint:
    place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    with _reading(path, "its header"):
        config = AutoConfig.from_pretrained(**place)
    return Checkpoint(
        name=path.stem,
        config=config,
        kind=_class_of(config),
        dtype=dtype or torch.float32,
        read=lambda skeleton: dict(gguf.read(path, config.get_text_config(), list(skeleton.state_dict()))),
        tokenizer=place,
    )


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Turn whatever transformers raises into one kind of error: it checks little, and fails anywhere."""
    try:
        yield
    except TPError:
        raise
    except Exception as error:
        # Some of them say only a name.
        said = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
        message = f"{path}: transformers {transformers.__version__} cannot read {what}: {said}"
        raise ModelError(message) from error


def _files(path: Path, weights: Path, kept: list[Any], dtype: torch.dtype) -> dict[str, Source]:
    # The same as those that are planned for.
    files = safetensors_files(weights)
    if files:
        sources: dict[str, Source] = {}
        for name in files:
            file: Any = safe_open(str(name), framework="pt")
            kept.append(file)
            for key in file.keys():  # noqa: SIM118  not a dict
                sources[key] = MappedSource(file.get_slice(key), dtype)
        return sources
    tensors = {}
    for pickled in sorted(path.glob("pytorch_model*.bin")):
        with _reading(pickled, "it"):
            tensors.update(torch.load(pickled, map_location="cpu", mmap=True, weights_only=True))
    if not tensors:
        message = f"{path}: no .safetensors and no pytorch_model*.bin in it"
        raise ModelError(message)
    return {name: TensorSource(tensor) for name, tensor in tensors.items()}


def _class_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    _check_config(config)
    for name in config.architectures or []:
        kind = getattr(transformers, name, None)
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel) and kind.can_generate():
            return kind
    with suppress(KeyError):
        found: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    message = (
        f"{config.model_type}: transformers {transformers.__version__} has no causal language model of it"
    )
    raise ModelError(message)


def _own_config(config: PretrainedConfig, kind: type[PreTrainedModel]) -> PretrainedConfig:
    """The text model's part of a wrapper's configuration, where the class is the text model's."""
    text = config.get_text_config()
    return text if kind.config_class is type(text) else config


def _check_config(config: PretrainedConfig) -> None:
    if getattr(config, "is_encoder_decoder", False):
        message = f"{config.model_type}: encoder-decoder models are not run in parts"
        raise ModelError(message)


def _dtype_of(config: PretrainedConfig) -> torch.dtype:
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32
