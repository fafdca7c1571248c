"""The one door to models and tokenizers of Hugging Face's form, which a stranger may have written.

No code of theirs runs and nothing is asked at a prompt, no link or name leads to a file outside of
the folder, and what cannot be loaded ends in a sentence. Imports neither torch nor transformers.
"""

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_let.errors import MachineError, UsageError, first_line

TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "merges.txt vocab.txt tokenizer.model spiece.model tekken.json chat_template.jinja"
).split()
OWN_FOLDER = "tokenizer"
"""Where a tokenizer's files lie if the model's folder would make another tokenizer of them."""
SUFFIXES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")
"""Of the files that are read."""
SIGNS = {
    b"version https://git-lfs": "it is a pointer of Git LFS: fetch the file itself, git lfs pull",
    b"<": "it is a web page, perhaps of an error",
}

AWAY = ConnectionError, TimeoutError, socket.gaierror
BUSY = (408, 429, *range(500, 600))
"""What a hub answers that may answer otherwise later."""


class OutsideError(UsageError):
    """Files that would have code of theirs run, or that lead out of their folder."""


def load(auto: Any, source: str | Path, failure: str = "", **options: Any) -> Any:
    """Return `auto.from_pretrained(source)`, of one of transformers' `Auto` classes, as `told`.

    A file of llama.cpp's form, `*.gguf`, holds configuration, weights and tokenizer; the package
    gguf reads it.
    """
    bars_on_a_terminal_only()
    if is_gguf(source):
        options["gguf_file"] = Path(source).name
        source = Path(source).parent
    with told(source, failure, weights=auto.__name__.startswith("AutoModel")):
        if auto.__name__ != "AutoTokenizer" and (Path(source) / "adapter_config.json").is_file():
            raise OutsideError(
                f"{source} holds an adapter (adapter_config.json) of a model that lies elsewhere. "
                "Merge them: load the folder with peft's AutoPeftModelForCausalLM, call "
                "merge_and_unload, and save what that returns with save_pretrained."
            )
        loaded = auto.from_pretrained(source, trust_remote_code=False, **options)
    # A kernel of the hub, as "owner/name", is code too.
    if "/" in str(getattr(loaded, "_attn_implementation", "")):
        raise remote_code(source)
    return loaded


@contextmanager
def told(source: str | Path, failure: str = "", weights: bool = False) -> Iterator[None]:
    """Check a folder or hub id; what fails in the context is a `UsageError` of `failure` and why.

    Without `failure` it is said that the source cannot be loaded.
    """
    try:
        check_folder(Path(source), weights)
        yield
    except UsageError:
        raise
    except Exception as error:  # each library has its own kinds
        if "trust_remote_code" in str(error):
            raise remote_code(source) from error
        pickles = sorted(path.name for path in Path(source).glob("*.bin")) if weights else []
        failure = failure or f"{source} cannot be loaded."
        raise unreadable(failure, error, *pickles) from error


def check_folder(folder: Path, weights: bool = False) -> None:
    """Check that a folder's files lead nowhere else, and with `weights` that those are whole.

    They may link to each other, and those of the hub's cache into that cache.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix in SUFFIXES or path.name == OWN_FOLDER:
            _check_inside(folder, path)
        if path.name.endswith(".index.json"):
            for name in set(weight_map(path).values()):
                _check_inside(folder, folder / name)
        elif weights and path.suffix == ".safetensors":
            open_safetensors(path)


def check_revision(flag: str, revision: str | None, source: str) -> None:
    """Refuse a revision of what lies here, where there is but one."""
    if revision is not None and Path(source).exists():
        raise UsageError(
            f"{flag} {revision} has no effect on {source}, which is no hub id but lies here. Leave "
            "it out."
        )


def weight_map(index: Path) -> dict[str, str]:
    """Return each tensor's file as an index has it."""
    try:
        files = json.loads(index.read_bytes())["weight_map"]
        if all(isinstance(name, str) for name in files.values()):
            return files
        reason = "a file has no name"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = repr(error)
    raise UsageError(f"{index} is no index of weights ({reason}). Download it again.")


def weight_files(source: str, revision: str | None = None) -> list[Path]:
    """What transformers reads of a folder or hub id, as far as it is here; UsageError, as above."""
    folder = Path(source)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(source, revision=revision, local_files_only=True))
        except (OSError, ValueError):  # nothing is here; no hub id
            return []
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            return sorted({folder / file for file in weight_map(index).values()})
    return []


def open_safetensors(path: Path) -> Any:
    """Open a file of weights; its header is compared with its size."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} cannot be read: {_what_is_it(path)} ({error}).") from error


def bars_on_a_terminal_only() -> None:
    """Have transformers draw its progress bars only where someone sees them move."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def is_gguf(source: str | Path) -> bool:
    """Whether a model is one file of llama.cpp's form."""
    return str(source).endswith(".gguf") and os.path.isfile(source)


def context(config: Any) -> int:
    """Return the longest sequence that a model reads: `sys.maxsize` for ALiBi and recurrence."""
    config = config.get_text_config()  # of a model that sees pictures, too
    names = ("max_position_embeddings", "max_seq_len")
    return max(getattr(config, name, None) or 0 for name in names) or sys.maxsize


def own_folder(folder: Path) -> Path:
    """Return where a model's folder holds its tokenizer."""
    own = folder / OWN_FOLDER
    return own if own.is_dir() else folder


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder holds a tokenizer."""
    places = folder, folder / OWN_FOLDER
    return any((place / name).is_file() for place in places for name in TOKENIZER_FILES)


def check_vocabulary(tokenizer: Any) -> Any:
    """Return a tokenizer; refuse what transformers makes up, for some, of a folder without one."""
    if len(tokenizer) > len(tokenizer.added_tokens_decoder):
        return tokenizer
    raise UsageError(
        f"it has special tokens alone, as where {tokenizer.name_or_path} holds no tokenizer: give "
        f"a folder that does; beside a model of ours it may be the folder {OWN_FOLDER!r} in it"
    )


def unreadable(failure: str, error: BaseException, *files: str) -> UsageError:
    """Return what is said of something that cannot be loaded; a hub that is away may come back."""
    from huggingface_hub.errors import OfflineModeIsEnabled  # a ConnectionError

    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    answers = (getattr(cause, "response", None) for cause in causes)
    status = next((answer.status_code for answer in answers if answer is not None), None)
    reason = ": ".join([*files, first_line(error).rstrip(".:")])
    if status in (401, 403):
        reason += f"; the hub answers {status}: ask for access on its page, and run hf auth login"
    is_offline = any(isinstance(cause, OfflineModeIsEnabled) for cause in causes)
    is_away = any(isinstance(cause, AWAY) for cause in causes) and not is_offline
    if is_away if status is None else status in BUSY:
        return MachineError(f"{failure} ({reason}; the hub is away: {first_line(causes[-1])})")
    return UsageError(f"{failure} ({reason})")


def _check_inside(folder: Path, path: Path) -> None:
    inside, target = folder.resolve(), path.resolve()
    allowed = [inside]
    if inside.parent.name == "snapshots":  # the hub's cache, of one model and of all
        allowed += [inside.parents[1] / "blobs", inside.parents[2] / "blobs"]
    if not any(map(target.is_relative_to, allowed)):
        raise OutsideError(
            f"{path} leads out of the folder, to {target}, and is not followed: what a stranger's "
            "link names could be any file of yours. If it is meant, put a copy in its place."
        )


def _what_is_it(path: Path) -> str:
    try:
        start = path.read_bytes()[:64] if path.stat().st_size < 1 << 20 else b"\0"
    except OSError:
        return "it is not there"
    if not start:
        return "it is empty"
    meanings = (meaning for sign, meaning in SIGNS.items() if start.lstrip().startswith(sign))
    return next(meanings, "it was cut off, or is damaged: download it again")


def remote_code(source: object, way_out: str = "") -> OutsideError:
    """Return what is said of files that need code of their own."""
    return OutsideError(
        f"{source} needs remote code, Python that comes with its files (auto_map), and that is "
        f"not run here. Choose one that transformers knows by itself, or save it as such a one "
        f"where you trust it{way_out}."
    )
