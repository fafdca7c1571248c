#!/usr/bin/env bash
# Train on nodes without Slurm: the same line on every node, torchrun's agents find each other at HEAD.
#
#   HEAD=node0:29500 NODES=2 examples/torchrun/train.sh @run.flags --save /shared/run ...
#
# PROCESSES: of a node (all GPUs by default; without GPUs give it, and --cpu). A rank that dies takes the others
# along, and all begin anew from the newest checkpoint, RESTARTS times (3). SAVE_SECONDS: for the checkpoint after
# TERM (540). ID: another one for each run that shares a HEAD.
set -euo pipefail
HEAD=${HEAD:-localhost:29500}
NODES=${NODES:-1}
PROCESSES=${PROCESSES:-gpu}
RESTARTS=${RESTARTS:-3}
here=$(realpath "$(dirname "${BASH_SOURCE[0]}")/../..")
PYTHON=${PYTHON:-$([ -x "$here/.venv/bin/python" ] && echo "$here/.venv/bin/python" || echo python)}

[ "$NODES" = 1 ] || [ "${HEAD%%:*}" != localhost ] || { echo "HEAD: a node's name that all reach" >&2 && exit 2; }
expanded=$(PYTHONPATH=$here "$PYTHON" -m megatron_let.program "$@") || exit 2
mapfile -t words <<<"$expanded"
save="" load="" previous=""
for word in "${words[@]}"; do
    case $word in
    --save=*) save=${word#*=} ;;
    --load=*) load=${word#*=} ;;
    --finetune) echo "every start would begin anew: use --pretrained-checkpoint in place of --finetune" >&2 && exit 2 ;;
    --ckpt-step | --ckpt-step=*) echo "every start would go back to --ckpt-step: leave it out, and move later iter_* folders away" >&2 && exit 2 ;;
    esac
    [ "$previous" != --save ] || save=$word
    [ "$previous" != --load ] || load=$word
    previous=$word
done
[ -n "$save" ] || { echo "add --save DIR: without checkpoints nothing can go on" >&2 && exit 2; }
if [ -n "$load" ] && [ "$(realpath -m -- "$load")" != "$(realpath -m -- "$save")" ]; then
    echo "every start would begin from --load $load: use --pretrained-checkpoint for it" >&2
    exit 2
fi
[ -n "$load" ] || words+=(--load "$save") # where it is empty the run begins
words+=(--exit-signal-handler)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${SAVE_SECONDS:-540} # torchrun kills its ranks after 30 s otherwise
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$PYTHON" "$here/examples/slurm/launch.py" --nnodes "$NODES" --nproc-per-node "$PROCESSES" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${ID:-megatron_let}" \
    --max-restarts "$RESTARTS" "$here/pretrain_let.py" "${words[@]}"
