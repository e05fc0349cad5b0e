#!/usr/bin/env bash
# Train a recipe with EMP where no Slurm starts the processes: on this machine, or on several.
#
#   bash torchrun.sh RECIPE [--KEY VALUE ...]                              # this machine's GPUs, or 2 CPU processes
#   STRATEGY=fsdp2 PROCESSES=8 bash torchrun.sh RECIPE                     # ddp, fsdp2, zero2, zero3; else the recipe's
#   NODES=2 RENDEZVOUS=node1:29400 RUN=/shared/fit bash torchrun.sh RECIPE # the same line on each node; node1 is one
#
# A worker that dies is started again with all others, up to RESTARTS times; a node that died joins again with the same
# line. All go on from the last checkpoint of the recipe's ModelCheckpoint, RUN/checkpoints/last.ckpt (a recipe without
# one saves at the end of each epoch). So does a stopped run, with the same RUN.
set -euo pipefail

[ $# -ge 1 ] || { echo "usage: bash torchrun.sh RECIPE [--KEY VALUE ...]" >&2; exit 2; }
RECIPE=$1
shift
GPUS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
PROCESSES=${PROCESSES:-$((GPUS ? GPUS : 2))}       # per node
NODES=${NODES:-1}
RESTARTS=${RESTARTS:-3}
if [ "$NODES" = 1 ]; then
  RUN=${RUN:-runs/fit-$(date +%Y%m%d-%H%M%S)}
  WHERE=(--standalone)
else
  : "${RENDEZVOUS:?HOST:PORT of one of the nodes, the same on all}" "${RUN:?a folder that all nodes see}"
  WHERE=(--rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "$(basename "$RUN")")
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / PROCESSES ? $(nproc) / PROCESSES : 1))}

exec torchrun "${WHERE[@]}" --nnodes "$NODES" --nproc-per-node "$PROCESSES" --max-restarts "$RESTARTS" --no-python \
  emp fit --config "$RECIPE" ${STRATEGY:+--config "cluster/$STRATEGY"} "$@" \
  --trainer.num_nodes "$NODES" --trainer.devices "$PROCESSES" --trainer.default_root_dir "$RUN" --ckpt_path last
