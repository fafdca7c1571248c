import json
import re

import pytest

from megatron_let.report.runs import read_run
from tests.support.testing import run_distributed, save_tiny_teacher

WRAPPED = {
    "training_log": [
        "loss_dict",
        "total_loss_dict",
        "learning_rate",
        "iteration",
        "loss_scale",
        "report_memory_flag",
        "skipped_iter",
        "grad_norm",
        "params_norm",
        "num_zeros_in_grad",
        "max_attention_logit",
        "pg_collection",
        "is_first_iteration",
        "seqlen_squared_sum_in_batch",
        "total_real_tokens_in_batch",
    ],
    "evaluate": [
        "forward_step_func",
        "data_iterator",
        "model",
        "process_non_loss_data_func",
        "config",
        "verbose",
        "non_loss_data_func",
        "eval_iters",
        "pg_collection",
        "p2p_communicator",
    ],
    "save_checkpoint": [
        "iteration",
        "model",
        "optimizer",
        "opt_param_scheduler",
        "num_floating_point_operations_so_far",
        "checkpointing_context",
        "pipeline_rank",
        "expert_rank",
        "tensor_rank",
        "pipeline_parallel",
        "expert_parallel",
        "non_persistent_ckpt",
        "train_data_iterator",
        "preprocess_common_state_dict_fn",
        "release",
        "tp_group",
        "pp_group",
        "dp_cp_group",
        "dp_group",
        "expt_dp_group",
        "rng_state_key_prefix",
    ],
}


def test_signatures_of_the_wrapped_functions_are_the_known_ones():
    """If this fails, a new Megatron changed them: read `RunLog` against it before going on."""
    [signatures] = run_distributed("tests.unit.command_line:signatures", 1)
    assert signatures == WRAPPED


# --- parameters ---------------------------------------------------------------------------------

LLAMA = (
    "--swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope "
    "--ffn-hidden-size 48"
)
GQA = "--group-query-attention --num-query-groups 2 --kv-channels 16"
UNTIED = "--untie-embeddings-and-output-weights"
TP2 = "--tensor-model-parallel-size 2"
PP2 = "--pipeline-model-parallel-size 2"


def llama_parameters(*, groups, head, tables):
    """Four layers of width 32 and 4 heads, 256 tokens."""
    width, heads, ffn, layers, vocab = 32, 4, 48, 4, 256
    attention = width * head * (2 * heads + 2 * groups)
    layer = attention + 3 * width * ffn + 2 * width  # the layer's two norms
    return layers * layer + width + tables * vocab * width  # and the final norm


@pytest.mark.parametrize(
    ("layout", "flags", "expected"),
    [
        ("--global-batch-size 4", UNTIED, {"groups": 4, "head": 8, "tables": 2}),
        (f"{TP2} --sequence-parallel", f"{GQA} {UNTIED}", {"groups": 2, "head": 16, "tables": 2}),
        (TP2, GQA, {"groups": 2, "head": 16, "tables": 1}),
        (PP2, GQA, {"groups": 2, "head": 16, "tables": 1}),  # both stages hold the tied table
    ],
    ids=["dp2-untied", "tp2-sp-gqa-untied", "tp2-gqa-tied", "pp2-gqa-tied"],
)
def test_every_parameter_is_counted_once_in_every_layout(layout, flags, expected):
    function = "tests.unit.command_line:number_of_parameters"
    counts = run_distributed(function, 2, f"{LLAMA} {flags} {layout}".split())
    assert counts == [llama_parameters(**expected)] * 2


def test_biases_and_learned_positions_count_too():
    function = "tests.unit.command_line:number_of_parameters"
    width, layers = 32, 4
    norms, positions, table = (2 * layers + 1) * 2 * width, 16 * width, 256 * width
    layer = 12 * width * width + (3 + 1 + 4 + 1) * width
    expected = layers * layer + norms + positions + table
    assert run_distributed(function, 2, TP2.split()) == [expected] * 2


# --- a run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six steps with a learned map, guided in the first three: folder, and what was printed."""
    folder = tmp_path_factory.mktemp("run")
    teacher = save_tiny_teacher(folder / "teacher", vocab_size=300)
    flags = (
        f"--train-iters 6 --log-interval 1 --eval-interval 2 --eval-iters 1 --save {folder}/first "
        f"--save-interval 100 --num-workers 0 {LLAMA} {GQA} {UNTIED} --split 60,20,20 --method let "
        f"--teacher-model {teacher} --let-layer 2 --let-stop-step 3 --let-weight 0.5 "
        "--let-resize linear"
    )
    [printed] = run_distributed("tests.unit.command_line:train", 1, flags.split())
    return folder / "first", printed


def test_report_reads_what_a_run_wrote(run):
    record = read_run(run[0])
    assert (record.name, record.method, record.train_iters) == ("first", "let", 6)
    assert record.tokens_per_step == 2 * 16
    assert record.finished
    assert [r["iteration"] for r in record.train] == [1, 2, 3, 4, 5, 6]
    start = start_of(run[0])
    assert start["teacher"]["name"].endswith("/teacher")
    assert record.teacher_loss == start["teacher"]["lm_loss"]
    assert start["flops_per_token"]["teacher"] > 0


def start_of(folder):
    """The facts of a run's start."""
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])


def test_learned_map_is_no_parameter_of_the_student(run):
    expected = llama_parameters(groups=2, head=16, tables=2)
    assert read_run(run[0]).student_parameters == expected


def test_flops_charge_the_teacher_in_guided_steps_only(run):
    record = read_run(run[0])
    flops = [value for _, value in record.series("flops")]
    steps = [after - before for before, after in zip([0.0, *flops], flops, strict=False)]
    facts = start_of(run[0])["flops_per_token"]
    student, teacher = facts["student"], facts["teacher"]
    assert steps[:3] == pytest.approx([32 * (student + teacher)] * 3)
    assert steps[3:] == pytest.approx([32 * student] * 3)


def test_our_keys_are_logged_until_the_stop_step_and_never_after_it(run):
    folder, printed = run
    record = read_run(folder)
    for key in ("let loss", "let weight", "let gradient cosine", "teacher time (ms)"):
        assert [step for step, _ in record.series(key)] == [1, 2, 3]
    assert [weight for _, weight in record.series("let weight")] == pytest.approx(
        [0.5, 0.5 * 2 / 3, 0.5 / 3]
    )
    lines = re.findall(r" iteration +(\d+)/ .*", printed)
    shown = [line for line in printed.splitlines() if re.search(r"iteration +\d+/", line)]
    assert lines == ["1", "2", "3", "4", "5", "6"]
    assert ["let loss" in line for line in shown] == [True] * 3 + [False] * 3


def test_first_evaluation_of_an_iteration_is_the_one_recorded(run):
    """At the end Megatron evaluates once more, and then the test set, at the same iteration."""
    folder, printed = run
    evaluations = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    evaluations = [r for r in evaluations if r["kind"] == "valid"]
    assert [r["iteration"] for r in evaluations] == [2, 4, 6]
    shown = re.findall(r"loss at iteration 6 .*?lm loss value: (\S+)", printed)
    assert len(shown) == 3
    assert evaluations[-1]["lm loss"] == pytest.approx(float(shown[0]), rel=1e-5)
    assert not any(key.startswith("let") for record in evaluations for key in record)


def test_summary_names_student_teacher_layer_and_cost(run):
    _, printed = run
    for words in (
        "> --method let",
        "> student: 0.06 M parameters, 4 layers of width 32, TP 1 x PP 1 x DP 1",
        "> LET: layer 2 of 4 with the teacher's layer 2 of 2, weight 0.5 linear until step 3",
        "> the teacher runs on pipeline stage 0 of 1 (from 0)",
        "/teacher: 0.07 M parameters, weights ",
        "> expected extra FLOPs in a guided step: ",
    ):
        assert words in printed
