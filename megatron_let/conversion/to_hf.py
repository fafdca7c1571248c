"""Writes a run's checkpoint as a folder that `transformers.from_pretrained` loads."""

import contextlib
import re
import shutil
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from megatron_let.conversion.checkpoint import Checkpoint, find_checkpoint
from megatron_let.conversion.llama import check_vocabulary, llama_config, model_shape
from megatron_let.conversion.mapping import ModelShape, convert, rules_for
from megatron_let.errors import UsageError
from megatron_let.terminal import bars_on_a_terminal_only

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAMPLE_TOKENS = 32
TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json "
    "merges.txt vocab.txt tokenizer.model chat_template.jinja"
).split()


@dataclass(frozen=True)
class ExportConfig:
    """One export.

    Raises:
        UsageError: a value that cannot be right.
    """

    load: Path
    """`--save` of the run."""
    output: Path
    """The folder to write; it must not exist, or be empty."""
    ckpt_step: int | None = None
    """The iteration; the latest if None."""
    tokenizer_model: str | None = None
    """Folder or hub id; the run's own if None."""
    dtype: str | None = None
    """A key of `DTYPES`; as saved if None."""
    max_shard_size: str = "5GB"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d+(\.\d+)?[KMGT]B", self.max_shard_size):
            raise UsageError(
                f"--max-shard-size {self.max_shard_size} is not a size such as 5GB or 500MB."
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"--dtype {self.dtype} is not one of {', '.join(DTYPES)}.")
        if self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir())):
            raise UsageError(
                f"--output {self.output} is not empty, and nothing is overwritten. Remove it or "
                "choose another folder."
            )


def export(config: ExportConfig) -> Path:
    """Write the model and its tokenizer; returns the folder, which appears complete or not at all.

    At most one copy of the weights and one of Megatron's tensors are in memory.

    Raises:
        UsageError: there is no such checkpoint, the model is no Llama, its tensors are not
            those of one, or the tokenizer is not the run's.
    """
    bars_on_a_terminal_only()
    checkpoint = Checkpoint(find_checkpoint(config.load, config.ckpt_step))
    args = checkpoint.args()
    source = config.tokenizer_model or _tokenizer_of_run(args)
    tokenizer = load_tokenizer(source) if source is not None else None
    vocab_size = args.vocab_size if tokenizer is None else len(tokenizer)
    if config.tokenizer_model is not None:
        check_vocabulary(args, vocab_size)
    shape = model_shape(args, vocab_size)
    hf_config = llama_config(args, shape, tokenizer)
    tied = hf_config.tie_word_embeddings
    state = _read_weights(checkpoint, shape, tied=tied, dtype=DTYPES.get(config.dtype or ""))
    model = _assemble(hf_config, state)
    with _complete_or_absent(config.output) as folder:
        _write_model(model, folder, config.max_shard_size)
        if source is not None and tokenizer is not None:
            _write_tokenizer(source, tokenizer, folder)
    return config.output


def sample(folder: Path, prompt: str) -> str:
    """Return what an exported model writes after `prompt`, choosing the likeliest tokens.

    Raises:
        UsageError: the folder has no tokenizer, or the prompt no tokens.
    """
    bars_on_a_terminal_only()
    tokenizer = load_tokenizer(str(folder))
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].shape[1] == 0:
        raise UsageError(f"--sample {prompt!r} has no tokens.")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = model.generate(**inputs, max_new_tokens=SAMPLE_TOKENS, do_sample=False)
    return tokenizer.decode(tokens[0])


# --- the weights -------------------------------------------------------------------------------


def _read_weights(
    checkpoint: Checkpoint, shape: ModelShape, *, tied: bool, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    state = {}
    for rule in rules_for(checkpoint.names, tied=tied):
        for name, part in convert(rule, checkpoint.read(rule.megatron), shape):
            # A copy, since a view would keep the whole stacked tensor in memory.
            state[name] = part.to(dtype or part.dtype, copy=True).contiguous()
    return state


def _assemble(hf_config: Any, state: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """Return a model made of these tensors, which are not copied."""
    with torch.device("meta"):
        model = LlamaForCausalLM(hf_config)
    if hf_config.tie_word_embeddings:
        state = state | {"lm_head.weight": state["model.embed_tokens.weight"]}
    expected = model.state_dict()
    for name, weight in state.items():
        if weight.shape != expected[name].shape:
            raise UsageError(
                f"{name} has the shape {tuple(weight.shape)}; the run's arguments make it "
                f"{tuple(expected[name].shape)}."
            )
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    return model


def _write_model(model: LlamaForCausalLM, folder: Path, max_shard_size: str) -> None:
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    # safetensors writes for the owner only, whatever the umask: a model is to be shared.
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


# --- the tokenizer -----------------------------------------------------------------------------


def load_tokenizer(source: str) -> Any:
    """Load a tokenizer from a folder or hub id, without remote code.

    Raises:
        UsageError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UsageError(
            f"The tokenizer {source} cannot be loaded: {reason} Give the run's tokenizer with "
            "--tokenizer-model."
        ) from error


def _tokenizer_of_run(args: Namespace) -> str | None:
    if args.tokenizer_type == "HuggingFaceTokenizer":
        return args.tokenizer_model
    if args.tokenizer_type == "NullTokenizer":
        return None
    raise UsageError(
        f"The run used --tokenizer-type {args.tokenizer_type}, which has no Hugging Face folder. "
        "Give one with the same token ids with --tokenizer-model."
    )


def _write_tokenizer(source: str, tokenizer: Any, folder: Path) -> None:
    """Copy the tokenizer's files, or save it if it came from the hub; then check what loads."""
    if Path(source).is_dir():
        for name in TOKENIZER_FILES:
            if (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, folder / name)
    else:
        tokenizer.save_pretrained(folder)
    if load_tokenizer(str(folder)).get_vocab() != tokenizer.get_vocab():
        raise UsageError(
            f"The tokenizer {source} has files beside {', '.join(TOKENIZER_FILES)} and cannot be "
            "copied. Save it with transformers' save_pretrained and give that folder."
        )


@contextlib.contextmanager
def _complete_or_absent(output: Path) -> Iterator[Path]:
    """Give a folder beside `output` to write into; it takes that name if nothing fails."""
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed export
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
