"""Loads a teacher from a Hugging Face folder or hub id, and checks that it is one."""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from megatron_let import hugging_face
from megatron_let.errors import MachineError, UsageError
from megatron_let.hugging_face import is_gguf

CHOOSE = "Choose a decoder such as Llama, Qwen, OPT, GPT-NeoX or GPT-2."
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TeacherConfig:
    """What can be known of a teacher without its weights."""

    name: str
    revision: str | None
    num_layers: int
    hidden_size: int
    """Width of the states between the layers."""
    last_width: int
    """Width of the states after the last layer."""
    context: int
    """Longest sequence in tokens."""
    vocab_size: int
    """Rows of the embedding; padding rows above the tokenizer's ids are fine."""

    def width(self, layer: int | None) -> int:
        """Width of a layer's states; None for the last layer's."""
        return self.last_width if layer is None else self.hidden_size

    @property
    def head_flops_per_token(self) -> float:
        """FLOPs of the language-model head."""
        return 2.0 * self.last_width * self.vocab_size


def read_teacher_config(name: str, revision: str | None = None) -> TeacherConfig:
    """Read a teacher's configuration; raises UsageError if it is no causal language model's."""
    if name.startswith(("/", ".", "~")) and not (os.path.isdir(name) or is_gguf(name)):
        raise UsageError(
            f"--teacher-model {name}: there is no such folder, or you may not read it. Give the "
            "folder of a Hugging Face causal language model, a .gguf file, or a hub id such as "
            "HuggingFaceTB/SmolLM-135M."
        )
    hugging_face.check_revision("--teacher-revision", revision, name)
    where = "folder" if Path(name).exists() else "folder, nor a hub id that can be reached"
    config = hugging_face.load(
        AutoConfig,
        name,
        f"--teacher-model {name} is not a readable model {where}: it needs a config.json that "
        "transformers knows.",
        revision=revision,
    )
    known = {name.lower() for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}
    named = config.architectures or []  # early ones had capitals of their own: LLaMAForCausalLM
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (
        named and not any(architecture.lower() in known for architecture in named)
    ):
        raise UsageError(
            f"--teacher-model {name} is a {' / '.join(named) or config.model_type}, not a causal "
            f"language model. {CHOOSE}"
        )
    if config.is_encoder_decoder:
        raise UsageError(
            f"--teacher-model {name} is a {config.model_type}, half of which reads what the other "
            f"half writes about. {CHOOSE}"
        )
    config = config.get_text_config()  # of a model that sees pictures, too
    return TeacherConfig(
        name=name,
        revision=revision,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        # OPT projects its states to the embedding's width after the last layer.
        last_width=getattr(config, "word_embed_proj_dim", None) or config.hidden_size,
        context=hugging_face.context(config),
        vocab_size=config.vocab_size,
    )


def load_causal_lm(
    config: TeacherConfig, dtype: torch.dtype, device: torch.device, *, untrained: bool = False
) -> Any:
    """Load the frozen causal language model in evaluation mode.

    Weights are read from safetensors or with `weights_only`, remote code is off, and every random
    number generator is left as it was found: student weights must not depend on the teacher. An
    untrained one, a control, has random weights, always the same. Raises UsageError if weights are
    missing, or have another shape.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        shape = hugging_face.load(AutoConfig, config.name, config.name, revision=config.revision)
        if untrained:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(shape, dtype=dtype, trust_remote_code=False)
        else:
            model = _trained(config, shape, dtype)
    return model.to(device).eval().requires_grad_(False)


def _trained(config: TeacherConfig, shape: Any, dtype: torch.dtype) -> Any:
    needed = ""
    if getattr(shape, "quantization_config", None):
        needed = " They are quantized: choose the model in full precision."
    elif not hugging_face.weight_files(config.name, config.revision):
        needed = " It needs model.safetensors, or pytorch_model.bin."
    model, info = hugging_face.load(
        AutoModelForCausalLM,
        config.name,
        f"The weights of --teacher-model {config.name} could not be loaded.{needed}",
        revision=config.revision,
        dtype=dtype,
        ignore_mismatched_sizes=True,  # by us they are not
        output_loading_info=True,
    )
    others = (key for key, _, _ in info["mismatched_keys"])
    if missing := sorted({*info["missing_keys"], *others}):
        raise UsageError(
            f"--teacher-model {config.name} lacks {len(missing)} weights of the shape that its "
            f"config.json says, such as {missing[0]}: random ones would mislead the student. "
            "Export or download the model again."
        )
    return model


class TokenIds(dict[str, int]):
    """Token -> id of a tokenizer."""

    added: frozenset[str] = frozenset()
    """Those that were added to what was learnt from text."""

    def further(self, student: dict[str, int]) -> str | None:
        """A learnt token that the student lacks, if there is one.

        Then a text is cut otherwise, as by a longer list of the same merges, whatever the ids.
        What some call a byte of SentencePiece's form is no other token.
        """
        known = set(student.values())
        further = self.keys() - student.keys() - self.added
        return next((token for token in sorted(further) if self[token] not in known), None)


def read_token_ids(name: str, revision: str | None = None) -> TokenIds | None:
    """Return the teacher tokenizer's token -> id map, or None if there is no tokenizer.

    Raises UsageError if its files are there and cannot be loaded, or are not to be trusted.
    """
    source = str(hugging_face.own_folder(Path(name)))
    failure = f"The tokenizer of --teacher-model {name} cannot be loaded."
    try:
        tokenizer = hugging_face.load(AutoTokenizer, source, failure, revision=revision)
    except UsageError as error:
        is_told = isinstance(error, (hugging_face.OutsideError, MachineError))
        if is_told or hugging_face.has_tokenizer(Path(name)) or is_gguf(name):
            raise
        return None
    token_ids = TokenIds(tokenizer.get_vocab())
    token_ids.added = frozenset(tokenizer.get_added_vocab())
    # For some architectures transformers makes a tokenizer up, of nothing but special tokens.
    return token_ids if token_ids.keys() - token_ids.added else None


def numbers_alike(student: dict[str, int], teacher: TokenIds) -> bool:
    """Whether the two are one tokenizer, but for tokens that were added to the teacher's."""
    return teacher.further(student) is None and not any(differing(student, teacher))


def differing(student: dict[str, int], teacher: dict[str, int]) -> Iterator[tuple[str, int]]:
    """The student's tokens with another id in the teacher.

    Bytes of SentencePiece's form are left out: some are called otherwise elsewhere.
    """
    others = (pair for pair in student.items() if teacher.get(pair[0]) != pair[1])
    return (pair for pair in others if not re.fullmatch(r"<0x[0-9A-F]{2}>", pair[0]))


def check_token_ids(
    student: dict[str, int], teacher: TokenIds, teacher_name: str, flag: str = "--teacher-model"
) -> None:
    """Check that every token of the student has the same id in the teacher that `flag` names.

    The map is compared, not its size: both models read the same ids. A teacher to whose tokens
    some were added, or whose table is padded, is fine; one that has learnt more is not. Raises
    UsageError, which names a token and its two ids.
    """
    way_out = (
        "Choose another model, or train with its tokenizer: --tokenizer-type HuggingFaceTokenizer "
        f"--tokenizer-model {teacher_name}."
    )
    if flag == "--teacher-model":
        way_out += " Or --method let, whose teacher may have a tokenizer of its own."
    for token, index in differing(student, teacher):
        raise UsageError(
            f"Student and teacher number tokens differently: {token!r} is {index} in the student's "
            f"tokenizer and {teacher.get(token, 'absent')} in that of {flag} {teacher_name}. "
            f"{way_out}"
        )
    if (further := teacher.further(student)) is not None:
        raise UsageError(
            f"{flag} {teacher_name} has learnt tokens that the student's tokenizer lacks, such as "
            f"{further!r}: the same text is cut otherwise. {way_out}"
        )


def fingerprint(model: torch.nn.Module) -> str:
    """Return 16 hexadecimal digits that change with any weight of the model."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
