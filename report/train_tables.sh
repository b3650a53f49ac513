#!/usr/bin/env bash
# Train the runs of the tables of problems 3 and 4 that have no log in checkpoints/ yet; a stopped run goes on.
# usage: bash report/train_tables.sh [DATA_DIR]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd) data_dir=${1:-hw3_data}
all=normalise,augment,patches,anchor,conditional,teacher,diversity,self_training

# script, domain with labels, name of the run, seed, flags: trains the run with the target $target
train() {
  local script=$1 from=$2 name=$3 seed=$4 log
  shift 4
  case $name,$seed,$from in
    dann_entropy,0,$source | improved,0,$source) log=${script}_$target ;;      # the one that is shipped
    *) log=${script%%_*}_runs/${from}_$target/${name}_seed$seed ;;
  esac
  [ -f "$root/checkpoints/$log.jsonl" ] || python3 "$root/$script.py" --train --resume --data_dir "$data_dir" \
    --target "$target" --source "$from" --seed "$seed" "$@"
}

for target in mnistm svhn usps; do
  # the assignment's source, and that of other years of the course
  case $target in mnistm) source=usps other=svhn ;; svhn) source=mnistm other=usps ;; usps) source=svhn other=mnistm ;; esac
  for seed in 0 1 2; do
    for setting in source dann dann_entropy target; do
      train p3_dann $source $setting $seed --setting $setting
    done
    for setting in source dann_entropy; do
      train p3_dann $source ${setting}_not_augmented $seed --setting $setting --augment 0
      train p3_dann $other $setting $seed --setting $setting
    done
    train p4_adda $source plain $seed --pieces none
    train p4_adda $source improved $seed --pieces all
    train p4_adda $source improved_no_discriminator $seed --pieces $all,no_discriminator
    train p4_adda $other improved $seed --pieces all
  done
  pieces=
  for piece in normalise augment patches anchor conditional teacher diversity; do
    pieces=$pieces${pieces:+,}$piece
    train p4_adda $source up_to_$piece 0 --pieces $pieces
  done
  train p4_adda $source up_to_anchor_no_discriminator 0 --pieces normalise,augment,patches,anchor,no_discriminator
done
