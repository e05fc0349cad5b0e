#!/usr/bin/env bash
# Train a recipe with EMP where no Slurm starts the processes: on this machine, or on several.
#
#   bash torchrun.sh RECIPE [--KEY VALUE ...]                                # the GPUs of this machine, or 2 CPU processes
#   STRATEGY=fsdp2 PROCESSES=8 bash torchrun.sh RECIPE
#   NODES=2 RENDEZVOUS=node1:29400 RUN=/shared/fit bash torchrun.sh RECIPE     # the same line on each node; node1 is one
#
# A worker that dies is started again with all others, RESTARTS times, and a machine that dies once it has started this
# line again: all go on from the last checkpoint in RUN. A finished or stopped run goes on with the same RUN.
# (gpt_stdlib: ~30 s on 2 CPU cores with --trainer.max_steps 20)
set -euo pipefail

[ $# -ge 1 ] || { echo "usage: bash torchrun.sh RECIPE [--KEY VALUE ...]" >&2; exit 2; }
RECIPE=$1
shift
GPUS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
PROCESSES=${PROCESSES:-$((GPUS ? GPUS : 2))}       # per node
NODES=${NODES:-1}
RESTARTS=${RESTARTS:-3}
SAVE_EVERY=${SAVE_EVERY:-1000}                     # steps
if [ "$NODES" = 1 ]; then
  RUN=${RUN:-runs/fit-$(date +%Y%m%d-%H%M%S)}
  WHERE=(--standalone)
else
  : "${RENDEZVOUS:?HOST:PORT of one of the nodes, the same on all}" "${RUN:?a folder that all nodes see, the same on all}"
  WHERE=(--rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "$(basename "$RUN")")
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / PROCESSES ? $(nproc) / PROCESSES : 1))}

exec torchrun "${WHERE[@]}" --nnodes "$NODES" --nproc-per-node "$PROCESSES" --max-restarts "$RESTARTS" --no-python \
  emp fit --config "$RECIPE" --config "cluster/${STRATEGY:-ddp}" "$@" \
  --trainer.num_nodes "$NODES" --trainer.devices "$PROCESSES" --trainer.default_root_dir "$RUN" \
  --trainer.callbacks+=pytorch_lightning.callbacks.ModelCheckpoint --trainer.callbacks.dirpath "$RUN/checkpoints" \
  --trainer.callbacks.save_last link --trainer.callbacks.every_n_train_steps "$SAVE_EVERY" --ckpt_path last
