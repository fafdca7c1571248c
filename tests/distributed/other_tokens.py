"""The contract of a teacher with another tokenizer: what `contract` does, on rows of text.

The reference decodes the student's tokens one by one, tokenizes the text and each of its
beginnings, and reads every document or window by itself: nothing of `megatron_let.translation`.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import AutoTokenizer

from megatron_let.data.preprocess import PreprocessConfig, preprocess
from megatron_let.teacher import host
from megatron_let.translation import rows as translated_rows
from megatron_let.translation.rows import NOTHING
from megatron_let.upstream.batch import TEACHER_INDEX, TEACHER_TOKENS
from tests.distributed import contract
from tests.distributed.contract import MICRO_BATCH, SEQ, Gradients
from tests.support import tokenizers_of_ours as ours
from tests.support.testing import save_tiny_teacher

LENGTH = 48
"""Of the teacher's rows."""
own_micro_batch = contract.micro_batch


def make_models(folder: Path) -> None:
    """A student's tokenizer of 512 tokens, and teachers with another one: for rows, for windows.

    And a text in the student's tokens, for whole runs.
    """
    ours.save(ours.byte_level(512), folder / "student")
    for name, context in (("teacher", 128), ("short", 24)):
        save_tiny_teacher(folder / name, vocab_size=1024, context=context)
        ours.save(ours.byte_level(900, digits=True), folder / name)
    parts = [part for text in ours.texts() for part in text.split("\n\n")]
    lines = [json.dumps({"text": part}) + "\n" for part in parts if part.strip()]
    (folder / "text.jsonl").write_text("".join(lines))
    config = PreprocessConfig(
        input=(f"{folder}/text.jsonl",),
        output_prefix=f"{folder}/text",
        tokenizer_model=f"{folder}/student",
        append_eod=True,
    )
    preprocess(config)


def micro_batch(folder: str, index: int, documents: bool) -> dict[str, torch.Tensor]:
    """`contract.micro_batch` with text, and with ends where documents begin."""
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/student")
    ids = torch.tensor(tokenizer(ours.texts()[1]).input_ids)
    batch = own_micro_batch(index, documents)
    for row in range(MICRO_BATCH):
        start = 40 * (2 * index + row)
        text = ids[start : start + SEQ + 1].clone()
        if documents:
            text[contract.document_start(index, row) - 1] = tokenizer.eos_token_id
        batch["tokens"][row], batch["labels"][row] = text[:-1], text[1:]
    return batch


def layout_gradients(
    folder: str, words: list[str], batch: int, weights: dict[str, float], fault: str | None
) -> Gradients:
    """`contract.layout_gradients`; the rows come as a dataset's workers make them."""
    built: list[Any] = []
    build = contract.build_student

    def remember(*arguments: Any) -> Any:
        built[:] = [build(*arguments)]
        return built[0]

    def batches(args: Any, count: int) -> Iterator[dict[str, torch.Tensor]]:
        translator = built[0].method.host.translation._translator
        for one in plain(args, count):
            rows = [translator.row(tokens.numpy()) for tokens in one["tokens"]]
            if fault in INDEX_FAULTS:
                tokens = one["tokens"].numpy()
                rows = [
                    (ids, INDEX_FAULTS[fault](translator, t, ids, at))
                    for (ids, at), t in zip(rows, tokens, strict=True)
                ]
            pairs = [translated_rows.cut(ids, at, LENGTH) for ids, at in rows]
            for i, key in enumerate((TEACHER_TOKENS, TEACHER_INDEX)):
                one[key] = torch.from_numpy(np.stack([pair[i] for pair in pairs]))
            yield one

    plain = contract.micro_batches
    states = _gather_after_slicing if fault == "gather_after_slicing" else host_states_SBD
    with (
        mock.patch.object(contract, "build_student", remember),
        mock.patch.object(contract, "micro_batch", lambda i, d: micro_batch(folder, i, d)),
        mock.patch.object(contract, "micro_batches", batches),
        mock.patch.object(host, "states_SBD", states),
    ):
        return contract.layout_gradients(words, batch, weights)


def reference_gradients(folder: str, teacher: str, *arguments: Any) -> Gradients:
    """`contract.reference_gradients` with the targets written out."""
    read = (AutoTokenizer.from_pretrained(f"{folder}/{name}") for name in ("student", teacher))
    student, other = read

    def states(
        base: Any, tokens_BS: torch.Tensor, index: int, documents: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [_row(student, other, tokens.tolist()) for tokens in tokens_BS]
        found = torch.zeros(*tokens_BS.shape, base.config.hidden_size)
        for row, (ids, at) in enumerate(rows):
            read = _read_apart if documents else _read_windows
            states_TD = read(base, ids, other.eos_token_id)
            for i, j in enumerate(at):
                if j is not None:
                    found[row, i] = states_TD[j]
        has_target = torch.tensor([[j is not None for j in at] for _, at in rows]).float()
        return found.transpose(0, 1), has_target

    with (
        mock.patch.object(contract, "micro_batch", lambda i, d: micro_batch(folder, i, d)),
        mock.patch.object(contract, "_teacher_states", states),
    ):
        return contract.reference_gradients(*arguments)


def _row(student: Any, other: Any, tokens: list[int]) -> tuple[list[int], list[int | None]]:
    """The teacher's tokens of a row, and the target of each of the student's."""
    ids: list[int] = []
    at: list[int | None] = []
    document: list[int] = []

    def close() -> None:
        text = student.decode(document)
        own = other(text, add_special_tokens=False).input_ids
        for i in range(len(document)):
            begun = student.decode(document[: i + 1])
            alone = other(begun, add_special_tokens=False).input_ids
            is_cut = begun.endswith("\ufffd")
            meets = own[: len(alone)] == alone and not is_cut
            at.append(len(ids) + len(alone) - 1 if meets else None)
        ids.extend(own)
        document.clear()

    for token in tokens:
        if token == student.eos_token_id:
            close()
            at.append(len(ids))
            ids.append(other.eos_token_id)
        else:
            document.append(token)
    close()
    return ids, at


def _read_apart(base: Any, ids: list[int], end: int) -> torch.Tensor:
    """States `[T, D]`, each document read alone."""
    cuts = [i + 1 for i, token in enumerate(ids) if token == end]
    parts = torch.tensor(ids).tensor_split(cuts)
    return torch.cat([base(input_ids=p[None]).last_hidden_state[0] for p in parts if len(p)])


def _read_windows(base: Any, ids: list[int], end: int) -> torch.Tensor:
    """States `[T, D]`; by a context of 24 the first 24, then 12 at a time behind 12 others."""
    context, row = base.config.max_position_embeddings, ids + [0] * (LENGTH - len(ids))
    if context >= LENGTH:
        return base(input_ids=torch.tensor([row])).last_hidden_state[0]
    windows = [(0, 0), (12, 12), (24, 12)]
    states = [
        base(input_ids=torch.tensor([row[at : at + context]])).last_hidden_state[0, new:]
        for at, new in windows
    ]
    return torch.cat(states)


# --- twins ----------------------------------------------------------------------------------------


def _ends(translator: Any, tokens: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return translator.student.lengths[tokens].cumsum(), translator.teacher.lengths[ids].cumsum()


def _one_byte_off(translator: Any, tokens: np.ndarray, ids: np.ndarray, at: Any) -> np.ndarray:
    own, ends = _ends(translator, tokens, ids)
    found = ends.searchsorted(own + 1)
    return np.where(np.append(ends, NOTHING)[found] == own + 1, found, NOTHING)


def _later_token(translator: Any, tokens: np.ndarray, ids: np.ndarray, at: Any) -> np.ndarray:
    own, ends = _ends(translator, tokens, ids)
    return ends.searchsorted(own).clip(max=len(ids) - 1)


def _no_mask(translator: Any, tokens: np.ndarray, ids: np.ndarray, at: np.ndarray) -> np.ndarray:
    return at.clip(min=0)


INDEX_FAULTS: dict[str | None, Callable[..., np.ndarray]] = {
    "one_byte_off": _one_byte_off,
    "later_token": _later_token,
    "no_mask": _no_mask,
}


def _gather_after_slicing(
    teacher: Any, rows: Any, group: Any, positions_RS: torch.Tensor, index_BS: torch.Tensor
) -> torch.Tensor:
    """Each rank looks in its own slice for what may lie in another's."""
    states_SBD = host_states_SBD(teacher, rows, group, positions_RS)
    index_SB = index_BS[:, positions_RS[group.rank()]].transpose(0, 1)
    places = index_SB.clamp(0, len(states_SBD) - 1)[..., None]
    return states_SBD.gather(0, places.expand(-1, -1, states_SBD.size(-1)))


host_states_SBD = host.states_SBD
