#!/usr/bin/env bash
# Box CIFAR-10 checkpoints, export them, distil them with and without the key, and evaluate.
#
#   examples/cifar10.sh CHECKPOINT_FOLDER CIFAR10_FOLDER OUTPUT_FOLDER
#
# CHECKPOINT_FOLDER holds resnet20-12fca82f.th and resnet32-d509ac18.th (Idelbayev's CIFAR ResNets), CIFAR10_FOLDER
# the data set as Hugging Face parquet files; a torchvision resnet18 is trained first. Every step is skipped if its
# output is there, and an interrupted one goes on. For a smaller run:
#   SDBCTL_BOX_ARGS="--epochs 10 --owner-size 20000"   SDBCTL_EVAL_ARGS="--suite quick --epochs 8"
set -euo pipefail
checkpoints=$1 data="parquet:$2" out=$3
mkdir -p "$out"
[ -e "$out/k.bin" ] || sdbctl keygen "$out/k.bin"
[ -e "$out/resnet18.safetensors" ] || sdbctl train --arch resnet18 --data "$data" -o "$out/resnet18.safetensors" --resume
for original in "$checkpoints/resnet20-12fca82f.th" "$checkpoints/resnet32-d509ac18.th" "$out/resnet18.safetensors"; do
    name=$(basename "${original%.*}")
    box="$out/$name.boxed.safetensors" onnx="$out/$name.boxed.onnx"
    # shellcheck disable=SC2086
    [ -e "$box" ] || sdbctl box "$original" --key-file "$out/k.bin" --data "$data" -o "$box" --resume \
        ${SDBCTL_BOX_ARGS:-}
    [ -e "$onnx" ] || sdbctl export "$box" --key-file "$out/k.bin" -o "$onnx"
    [ -e "$out/$name.wrn16.safetensors" ] || sdbctl distill "$onnx" --student wrn16 --data "$data" \
        -o "$out/$name.wrn16.safetensors"
    [ -e "$out/$name.wrn16.keyed.safetensors" ] || sdbctl distill "$onnx" --student wrn16 --data "$data" \
        --key-file "$out/k.bin" -o "$out/$name.wrn16.keyed.safetensors"
    # shellcheck disable=SC2086
    sdbctl eval "$onnx" --attack --original "$original" --key-file "$out/k.bin" --data "$data" --student resnet8 \
        --report "$out/$name.report" --force ${SDBCTL_EVAL_ARGS:-}
done
