#!/usr/bin/env bash
# Pre-trains one arm of the recipes with Megatron's own pretrain_gpt.py:
#
#   bash examples/recipes/train_megatron.sh --arm adamw --model gpt2-124m --data data/openwebtext \
#     --out data/runs/adamw --lr 6e-4 --nproc_per_node 4
#
# The model's argument file (configs/megatron), the recipes' common one and the arm's (megatron_args) go to Megatron in
# this order, then what else is given here; of a flag given twice Megatron takes the last. Started again with the same
# --out it goes on from the newest checkpoint there. MEGATRON is a clone of Megatron-LM.
set -euo pipefail

usage="usage: train_megatron.sh --arm ARM --model MODEL --data FOLDER --out FOLDER --lr LR
  [--seed 41] [--nproc_per_node 1] [--script \$MEGATRON/pretrain_gpt.py] [--on-cpu] [MEGATRON ARGUMENTS...]"
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
configs=$here/../../configs/megatron
arm="" model="" data="" out="" lr="" seed=41 nproc_per_node=1
script=${MEGATRON:-Megatron-LM}/pretrain_gpt.py
runner=(-m blockwise_lr.megatron)
rest=()

fail() {
  echo "train_megatron.sh: $1" >&2
  exit 2
}

while (($#)); do
  case $1 in
    --arm | --model | --data | --out | --lr | --seed | --nproc_per_node | --script)
      (($# > 1)) || fail "$1 needs a value; $usage"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    --on-cpu) runner+=(--on-cpu); shift ;;
    *) rest+=("$1"); shift ;;
  esac
done
for name in arm model data out lr; do
  [[ -n ${!name} ]] || fail "--$name is missing; $usage"
done
[[ -f $here/megatron_args/$arm.args && $arm != common ]] || fail "there is no arm $arm in $here/megatron_args"
[[ -f $configs/$model.args ]] || fail "there is no model $model in configs/megatron"
[[ -f $data/meta.json && -f $data/training.idx ]] ||
  fail "$data holds no data with Megatron's index; run examples/recipes/prepare.py --out $data"
[[ -f $script ]] || fail "there is no $script; set MEGATRON to a clone of Megatron-LM"

# words of the files; read returns 1 at the end of its input
read -r -d '' -a arguments < <(cat "$configs/$model.args" "$here/megatron_args/common.args" "$here/megatron_args/$arm.args") || true
min_lr=$(LC_ALL=C awk -v lr="$lr" 'BEGIN { printf "%.6g", lr / 20 }') # one for all block types, as in the paper
mkdir -p "$out"
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron orders communication and computation by it
PYTHONPATH=$(dirname "$script")${PYTHONPATH:+:$PYTHONPATH} # the clone's modules lie beside its script
export PYTHONPATH

torchrun --standalone --nproc_per_node "$nproc_per_node" "${runner[@]}" "$script" "${arguments[@]}" \
  --lr "$lr" --min-lr "$min_lr" --seed "$seed" \
  --train-data-path "$data/training" --valid-data-path "$data/validation" --tokenizer-model "$data/tokenizer" \
  --save "$out/checkpoints" --load "$out/checkpoints" --tensorboard-dir "$out/tensorboard" \
  ${rest[@]+"${rest[@]}"} 2>&1 | tee -a "$out/log.txt"
