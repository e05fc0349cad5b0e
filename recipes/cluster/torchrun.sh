#!/usr/bin/env bash
# Train the GPT recipe with EMP on the GPUs (or CPUs) of this node.  bash recipes/cluster/torchrun.sh
# (~30 s on 2 CPU cores with the defaults below and --trainer.max_steps 20)
set -euo pipefail

# --- edit these two lines -------------------------------------------------------------------------------------------
PROCESSES=${PROCESSES:-2}                          # GPUs of the node, or CPU processes
STRATEGY=${STRATEGY:-ddp}                          # ddp | fsdp2 | zero2 | zero3   (zero2 and zero3 need GPUs)
# --------------------------------------------------------------------------------------------------------------------

HERE=$(cd "$(dirname "$0")" && pwd)
RECIPE=$HERE/../gpt_stdlib.yaml
[ -f "$RECIPE" ] || RECIPE=gpt_stdlib              # copied out alone (emp recipes cluster): the one in the package
CLASSES=pytorch_lightning.strategies
case "$STRATEGY" in
  ddp)         CHOICE=ddp ;;
  fsdp2)       CHOICE="{\"class_path\": \"$CLASSES.ModelParallelStrategy\"}" ;;
  zero2|zero3) CHOICE="{\"class_path\": \"$CLASSES.DeepSpeedStrategy\",
                        \"init_args\": {\"config\": \"$HERE/deepspeed_$STRATEGY.json\"}}" ;;
  *) echo "STRATEGY must be ddp, fsdp2, zero2 or zero3, got '$STRATEGY'" >&2; exit 2 ;;
esac

exec torchrun --standalone --nproc_per_node "$PROCESSES" --no-python \
  emp fit --config "$RECIPE" \
  --trainer.accelerator auto --trainer.devices "$PROCESSES" --trainer.strategy "$CHOICE" "$@"
