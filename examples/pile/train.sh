# What starts the recipes for the Pile; sourced by examples/pile_*/train.sh, which set size and
# default_teacher. The flags stand in run files: examples/pile/shared.flags, examples/pile_*/run.flags.
set -euo pipefail
METHOD=${METHOD:-let}
TEACHER=${TEACHER:-$default_teacher}
TOKENIZER=${TOKENIZER:-$TEACHER} # whose vocabulary the student has; another than TEACHER for a folder
DATA=$(realpath -m "${DATA:-/data/pile}")  # DATA/TOKENIZER: output of examples/pile/preprocess.sh
SAVE=$(realpath -m "${SAVE:-/checkpoints}") # the run is SAVE/pile_SIZE-METHOD-TEACHER-SEED
prepared=$DATA/$(basename "$TOKENIZER")
if [[ "$prepared$SAVE" =~ [[:space:]] ]]; then # blanks separate a blend's paths
    echo "$prepared and SAVE $SAVE: a path with a blank cannot be part of a blend of data" >&2
    exit 1
fi
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
    */*) # a folder, or another id
        if [ -e "$1" ]; then
            realpath "$1"
        elif [[ $1 == [./]* ]]; then
            echo "TEACHER, TOKENIZER or SMALL $1 does not exist" >&2 && exit 1
        else
            echo "$1"
        fi
        ;;
    *) echo "TEACHER, TOKENIZER or SMALL $1 is unknown: smollm-135m, opt-125m, pythia-160m, llama-3.2-1b," \
        "gpt2, a folder or an id with a /" >&2 && exit 1 ;;
    esac
}
teacher=$(hub "$TEACHER")
tokenizer=$(hub "$TOKENIZER")
run=$SAVE/pile_$size-$METHOD-$(basename "$TEACHER")-$SEED${INIT:+-$INIT}

here=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
case ${INIT:-random} in
random)
    if [ -n "${SMALL:-}" ]; then
        echo "SMALL $SMALL has no effect without INIT=grow" >&2
        exit 1
    fi
    recipe=("@$here/pile_$size/run.flags")
    ;;
grow)
    if [ ! -f "$here/pile_$size/grown.flags" ] || [ "$TOKENIZER" != smollm-135m ]; then
        echo "INIT=grow: only the 1.4b recipe with SmolLM's tokenizer has a shape for it" >&2
        exit 1
    fi
    small=$(hub "${SMALL:-smollm-135m}")
    recipe=("@$here/pile_$size/grown.flags" --init-from "$small")
    run=$run${SMALL:+-$(basename "$SMALL")}
    ;;
*) echo "INIT ${INIT} is unknown: random, grow" >&2 && exit 1 ;;
esac
blend=$prepared/pile_text_document # where it is not, to show the flags
if [ -f "$prepared/pile_text_blend.txt" ]; then
    blend=$(cat "$prepared/pile_text_blend.txt")
elif [ -z "${PRINT:-}" ]; then
    echo "No data at $prepared. Make it with examples/pile/preprocess.sh PILE $tokenizer $prepared" >&2
    exit 1
fi
data=(
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$tokenizer"
    --train-data-path $blend
    --valid-data-path "$prepared/valid_text_document"
    --data-cache-path "$prepared/cache" --seed "$SEED" --save "$run"
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

flags=("${recipe[@]}" "${data[@]}" "${method[@]}" "$@")
if [ -n "${PRINT:-}" ]; then
    printf '%q\n' "${flags[@]}" # as a shell and xargs read them
    exit
fi
cd "$here/.."
# shellcheck disable=SC2086  # SBATCH_OPTIONS: such as --partition=a100 --account=me
sbatch ${SBATCH_OPTIONS:-} --nodes "$NODES" --job-name "$(basename "$run")" examples/slurm/pretrain.sbatch "${flags[@]}"
