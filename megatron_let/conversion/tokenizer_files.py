"""The tokenizer that goes with a model: loaded, compared with the run's, and copied."""

import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from megatron_let import hugging_face
from megatron_let.data.tokenizer import tokenizer_fingerprint
from megatron_let.errors import UsageError
from megatron_let.hugging_face import OWN_FOLDER, TOKENIZER_FILES, own_folder


def load_tokenizer(source: str | Path, way_out: str = "") -> Any:
    """Load a tokenizer from a folder or hub id, without remote code; a UsageError without one."""
    failure = f"The tokenizer {source} cannot be loaded.{way_out}"
    tokenizer = hugging_face.load(AutoTokenizer, own_folder(Path(source)), failure)
    try:
        return hugging_face.check_vocabulary(tokenizer)
    except UsageError as error:
        raise UsageError(f"{failure} ({error})") from error


def tokenizer_of_run(args: Namespace) -> str | None:
    """Return the folder or hub id of the run's tokenizer, None without text."""
    if args.tokenizer_type == "HuggingFaceTokenizer":
        return args.tokenizer_model
    if args.tokenizer_type == "NullTokenizer":
        return None
    raise UsageError(
        f"The run used --tokenizer-type {args.tokenizer_type}, which has no Hugging Face folder. "
        "Give one with the same token ids with --tokenizer-model."
    )


def write_tokenizer(source: str | Path, tokenizer: Any, folder: Path) -> None:
    """Put a tokenizer into a model's folder, so that it loads from there as what it is.

    transformers 5 takes a tokenizer of the model's architecture where the files tell of none in
    particular, as with Qwen2: then they go to a folder of their own beside the model.
    """
    origin = own_folder(Path(source))

    def copy_files(place: Path) -> None:
        for name in TOKENIZER_FILES:
            if (origin / name).is_file():
                shutil.copyfile(origin / name, place / name)

    for place in (folder, folder / OWN_FOLDER):
        place.mkdir(exist_ok=True)
        for write in (copy_files, tokenizer.save_pretrained):
            before = set(place.iterdir())
            write(place)
            if _is_same(tokenizer, place):
                return
            for path in set(place.iterdir()) - before:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    raise UsageError(
        f"The tokenizer {source} becomes another one when it is written and loaded again. Save it "
        "with transformers' save_pretrained and give that folder."
    )


def _is_same(tokenizer: Any, folder: Path) -> bool:
    """Whether a folder's tokenizer loads, as that one."""
    try:
        return _identity(load_tokenizer(folder)) == _identity(tokenizer)
    except UsageError:  # files that a model's configuration explains
        return False


def _identity(tokenizer: Any) -> tuple[Any, ...]:
    """All that decides how a text is encoded, or a chat written."""
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else None
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return tokenizer.get_vocab(), rules, ids, tokenizer.chat_template


def check_tokenizer(args: Namespace, tokenizer: Any, source: str) -> None:
    """Refuse a tokenizer that is not the run's, as far as the checkpoint tells.

    That is its fingerprint or, with runs of Megatron-LM, its size as Megatron pads it. The one at
    the place that the run names is believed: its rows may be those of --padded-vocab-size.
    """
    of_run = vars(args).get("tokenizer_fingerprint")
    if of_run is not None:
        if (found := tokenizer_fingerprint(tokenizer.get_vocab())) != of_run:
            raise UsageError(
                f"The tokenizer {source} (fingerprint {found[:12]}) is not the one the model was "
                f"trained with ({of_run[:12]}, then at {args.tokenizer_model}). Give that one with "
                "--tokenizer-model."
            )
    elif source != args.tokenizer_model:
        multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
        size, pads = len(tokenizer), vars(args).get("pad_vocab_size", True)  # before 0.19 always
        padded = -(-size // multiple) * multiple if pads else size
        if args.padded_vocab_size != padded:
            raise UsageError(
                f"The tokenizer {source} has {size} tokens, padded to {padded} rows; the run's "
                f"model has {args.padded_vocab_size}. Give the run's tokenizer with "
                "--tokenizer-model. If the run set --padded-vocab-size, put it where the run had "
                f"it: {args.tokenizer_model}."
            )
