# What the recipes for the Pile share; sourced by examples/pile_*/train.sh, which set size, model,
# layout, batch and peak_lr. "Paper" is arXiv 2602.05393; where it is silent the comment says so.
set -euo pipefail
METHOD=${METHOD:-let}
TEACHER=${TEACHER:-$default_teacher}
TOKENIZER=${TOKENIZER:-$TEACHER} # whose vocabulary the student has; another than TEACHER for a folder
DATA=$(realpath -m "${DATA:-/data/pile}")  # DATA/TOKENIZER: output of examples/pile/preprocess.sh
SAVE=$(realpath -m "${SAVE:-/checkpoints}") # the run is SAVE/pile_SIZE-METHOD-TEACHER-SEED
NODES=${NODES:-4}                # of 8 A100-80GB: the paper's 32
SEED=${SEED:-1234}

# One name for the teacher, its tokenizer and the data made with it: the paper's three vocabularies,
# Llama's for 7 B, and gpt2, the paper's weak case.
hub() {
    case $1 in
    smollm-135m) echo HuggingFaceTB/SmolLM-135M ;;
    opt-125m) echo facebook/opt-125m ;;
    pythia-160m) echo EleutherAI/pythia-160m ;;
    llama-3.2-1b) echo meta-llama/Llama-3.2-1B ;;
    gpt2) echo openai-community/gpt2 ;;
    */*) echo "$1" ;; # a folder, or another id
    *) echo "TEACHER or TOKENIZER $1 is unknown: smollm-135m, opt-125m, pythia-160m, llama-3.2-1b," \
        "gpt2, a folder or an id with a /" >&2 && exit 1 ;;
    esac
}
teacher=$(hub "$TEACHER")
tokenizer=$(hub "$TOKENIZER")
run=$SAVE/pile_$size-$METHOD-$(basename "$TEACHER")-$SEED${INIT:+-$INIT}

architecture=( # Paper: LLaMA style, RMSNorm, SwiGLU, bf16.
    --swiglu --normalization RMSNorm --disable-bias-linear --position-embedding-type rope
    --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.02
    --bf16
)
case ${INIT:-random} in
random) # Untied: the sizes come out right so.
    architecture+=(--norm-epsilon 1e-5 --untie-embeddings-and-output-weights)
    ;;
grow) # The epsilon is SmolLM's 1e-5 x 576 / 2048, its rotary base 10000 (the default).
    if [ -z "${grown:-}" ] || [ "$TOKENIZER" != smollm-135m ]; then
        echo "INIT=grow: only the 1.4b recipe with SmolLM's tokenizer has a shape for it" >&2
        exit 1
    fi
    model=("${grown[@]}")
    architecture+=(--norm-epsilon 2.8125e-6 --init-from "${SMALL:-HuggingFaceTB/SmolLM-135M}")
    ;;
*) echo "INIT ${INIT} is unknown: random, grow" >&2 && exit 1 ;;
esac
sequence=( # The paper is silent; 2048 is the context of its teachers for 1.4 B.
    --seq-length 2048 --max-position-embeddings 2048
)
# Paper: about 20 B tokens. 19,073 steps of 512 x 2048 are 20.0 B; the batch is not in the paper, and
# 1 M tokens is common at these sizes.
length=(--train-iters 19073 --global-batch-size 512)
optimizer=( # Paper: AdamW, cosine. The rest is LLaMA's (arXiv 2302.13971).
    --lr "$peak_lr" --min-lr "$min_lr" --lr-decay-style cosine --lr-warmup-iters 200
    --adam-beta1 0.9 --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
    --use-distributed-optimizer
)
prepared=$DATA/$(basename "$TOKENIZER")
if [ ! -f "$prepared/pile_text_blend.txt" ]; then
    echo "No data at $prepared. Make it with examples/pile/preprocess.sh PILE $tokenizer $prepared" >&2
    exit 1
fi
data=(
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$tokenizer"
    --train-data-path $(cat "$prepared/pile_text_blend.txt")
    --valid-data-path "$prepared/valid_text_document"
    --data-cache-path "$prepared/cache" --num-workers 4
)
logging=( # An evaluation every 2 % of the run, so that steps to target can be read off.
    --seed "$SEED" --log-interval 10
    --eval-interval 380 --eval-iters 10
    # All 20 are kept (--save-keep-last N keeps fewer): about 20 GB each at 1.4 B, 40 at 3 B, 105 at 7 B.
    --save "$run" --save-interval 1000 --verify-integrity
)
case $METHOD in
baseline) method=(--method baseline) ;;
let | salt | reverse-kd | let+salt)
    # LET: layer 3, weight 0.1 (paper) to zero at step 1500, 7.9 % of the run (layer and step are ours:
    # the paper has no numbers). SALT: until 17.3 % of the run, as arXiv 2410.18779.
    method=(--method "$METHOD" --teacher-model "$teacher")
    ;;
*) echo "METHOD $METHOD is unknown: baseline, let, salt, reverse-kd, let+salt" >&2 && exit 1 ;;
esac

flags=("${model[@]}" "${architecture[@]}" "${sequence[@]}" "${length[@]}" "${batch[@]}"
    "${layout[@]}" "${optimizer[@]}" "${data[@]}" "${logging[@]}" "${method[@]}" "$@")
if [ -n "${PRINT:-}" ]; then
    printf '%s\n' "${flags[@]}"
    exit
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
sbatch --nodes "$NODES" --job-name "$(basename "$run")" examples/slurm/pretrain.sbatch "${flags[@]}"
