"""From a model's name to a local directory: `resolve`; what is cached, and what a model is: `show`.

Knows names, the bundled demo model and huggingface_hub, which does every download (it checks
hashes, resumes, and handles tokens; no token is ever put into a message here). Does not know what
is in a file; `Checkpoint` does. huggingface_hub is imported only where the hub or its cache is
asked for: a model in a directory needs neither it nor a network.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pace_nb.errors import ModelFormatError, ModelNotFoundError

DEMO_MODEL = Path(__file__).resolve().parent.parent / "demo"
DEMO_DRAFT = DEMO_MODEL / "draft"  # its PARD draft

# What is downloaded. Not the same weights once more in another form: pickled, in folders
# (original/, onnx/), or as their authors trained them (consolidated.*).
WANTED_FILES = [
    "*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer*", "*.jinja", "*.model",
]  # fmt: skip
UNWANTED_FILES = ["*/*", "*.bin", "consolidated*"]

# owner/name, or the name alone of the hub's oldest models ("gpt2").
_HUB_NAME = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?", re.ASCII)


@dataclass(frozen=True)
class CachedModel:
    """One downloaded snapshot in the Hugging Face cache. `name` is what `resolve` takes."""

    name: str
    revision: str  # commit
    refs: tuple[str, ...]  # branches and tags that point to it
    directory: Path
    nbytes: int
    last_modified: float  # seconds since 1970


@dataclass(frozen=True)
class ModelFacts:
    """What config.json and the headers of the weight files say. None: config.json does not say."""

    name: str
    directory: Path
    architecture: str | None
    is_supported: bool
    num_parameters: int  # elements of all tensors; a tied head counts once
    dtypes: tuple[str, ...]  # of the tensors, as the files call them, most elements first
    nbytes: int
    num_files: int
    num_tensors: int
    context_length: int | None  # max_position_embeddings
    vocab_size: int | None
    hidden_size: int | None
    num_hidden_layers: int | None
    num_attention_heads: int | None
    num_key_value_heads: int | None


def resolve(
    model: str | os.PathLike[str] | None,
    revision: str | None = None,
    token: str | None = None,
    offline: bool | None = None,
) -> Path:
    """The local directory of a model, downloaded from the hub where need be.

    model: None for the bundled demo model, an existing directory, or a name on the hub.
    revision: branch, tag or commit on the hub. token: for gated and private models; by default
    huggingface_hub looks for one. offline: use only what is cached (None: HF_HUB_OFFLINE decides).
    Raises ModelNotFoundError, ModelFormatError for a model without safetensors.
    """
    if model is None:
        return DEMO_MODEL
    name = os.fspath(model)
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path):
        raise ModelNotFoundError(f"model {name!r} is a file, expected its directory or a hub name")
    if not isinstance(model, str) or not _HUB_NAME.fullmatch(name):
        raise ModelNotFoundError(
            f"model {name!r}: no such directory, and not a hub name (owner/name)"
        )
    return download(name, revision, token, offline)


def download(
    name: str,
    revision: str | None = None,
    token: str | None = None,
    offline: bool | None = None,
) -> Path:
    """The cached snapshot of a model on the hub, after fetching what is missing. As `resolve`."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    what = f"model {name!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        directory = Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                token=token,
                local_files_only=bool(offline),
                allow_patterns=WANTED_FILES,
                ignore_patterns=UNWANTED_FILES,
            )
        )
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{what} is gated: accept its licence at {constants.ENDPOINT}/{name}, then give a token"
            " (HF_TOKEN, or 'hf auth login')"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{what}: no such directory, and not on the hub (a private one needs a token: HF_TOKEN,"
            " or 'hf auth login')"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{what}: the hub has the model but not this revision") from error
    except errors.HFValidationError as error:
        raise ModelNotFoundError(
            f"{what}: no such directory, and not a hub name (owner/name)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        partly = type(error).__name__ == "IncompleteSnapshotError"  # since huggingface_hub 2
        why = (
            "offline mode is on"
            if offline or constants.HF_HUB_OFFLINE
            else f"{constants.ENDPOINT} cannot be reached"
        )
        raise ModelNotFoundError(
            f"{what}: no such directory, {'only partly' if partly else 'not'} in the local cache,"
            f" and {why}"
        ) from error
    except Exception as error:  # disk full, connection lost: whatever the HTTP library of the day
        # raises. Not its text, which may quote headers; `--debug` shows it.
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ModelNotFoundError(f"{what}: cannot be downloaded: {reason}") from error
    if not any(file.suffix == ".safetensors" for file in directory.iterdir()):
        raise ModelFormatError(
            f"{what} has no safetensors weights on the hub; other formats are not read"
        )
    return directory


def list_cached() -> list[CachedModel]:
    """The snapshots in the Hugging Face cache that have safetensors and a config.json, by name."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return []
    found = []
    for repo in cache.repos:
        for revision in repo.revisions if repo.repo_type == "model" else ():
            names = {file.file_name for file in revision.files}
            if "config.json" in names and any(name.endswith(".safetensors") for name in names):
                found.append(
                    CachedModel(
                        name=repo.repo_id,
                        revision=revision.commit_hash,
                        refs=tuple(sorted(revision.refs)),
                        directory=Path(revision.snapshot_path),
                        nbytes=revision.size_on_disk,
                        last_modified=revision.last_modified,
                    )
                )
    return sorted(found, key=lambda model: (model.name, -model.last_modified, model.revision))


def show(
    model: str | os.PathLike[str] | None,
    revision: str | None = None,
    token: str | None = None,
    offline: bool | None = None,
) -> ModelFacts:
    """Facts about a model; arguments and errors as for `resolve` and `Checkpoint.open`."""
    from pace_nb.models.loader import Checkpoint
    from pace_nb.models.registry import ARCHITECTURES

    directory = resolve(model, revision, token, offline)
    with Checkpoint.open(directory) as checkpoint:
        config = checkpoint.config
        elements: Counter[str] = Counter()
        for name in checkpoint.names():
            elements[checkpoint.dtype(name)] += math.prod(checkpoint.shape(name))
        listed = config.get("architectures")
        first = listed[0] if isinstance(listed, list) and listed else None
        architecture = first if isinstance(first, str) else None
        return ModelFacts(
            name="demo" if model is None else os.fspath(model),
            directory=directory,
            architecture=architecture,
            is_supported=architecture in ARCHITECTURES,
            num_parameters=elements.total(),
            dtypes=tuple(dtype for dtype, _ in elements.most_common()),
            nbytes=checkpoint.nbytes,
            num_files=len(checkpoint.files),
            num_tensors=len(checkpoint.names()),
            context_length=_size(config, "max_position_embeddings"),
            vocab_size=_size(config, "vocab_size"),
            hidden_size=_size(config, "hidden_size"),
            num_hidden_layers=_size(config, "num_hidden_layers"),
            num_attention_heads=_size(config, "num_attention_heads"),
            num_key_value_heads=_size(config, "num_key_value_heads"),
        )


def _size(config: dict[str, Any], field: str) -> int | None:
    """An integer of config.json; text models inside larger ones keep theirs in `text_config`."""
    inner = config.get("text_config")
    for values in (config, inner if isinstance(inner, dict) else {}):
        if type(values.get(field)) is int:
            return int(values[field])
    return None
