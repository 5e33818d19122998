#!/usr/bin/env bash
# A hundred classes at 32x32, where distillation has more to give: train, box, export and evaluate a ResNet-20.
#
#   examples/tinyimagenet.sh DATA_FOLDER OUTPUT_FOLDER
#
# DATA_FOLDER holds Hugging Face parquet files. What is there is not made again.
set -euo pipefail
data="parquet:$1" out=$2
mkdir -p "$out"
[ -e "$out/k.bin" ] || sdbctl keygen "$out/k.bin"
[ -e "$out/resnet20.safetensors" ] || sdbctl train --arch resnet20 --data "$data" --epochs 10 --resume \
    -o "$out/resnet20.safetensors"
# shellcheck disable=SC2086
[ -e "$out/boxed.safetensors" ] || sdbctl box "$out/resnet20.safetensors" --key-file "$out/k.bin" --data "$data" --resume \
    -o "$out/boxed.safetensors" ${SDBCTL_EXAMPLE_ARGS:-}
[ -e "$out/boxed.onnx" ] || sdbctl export "$out/boxed.safetensors"
# shellcheck disable=SC2086
sdbctl eval "$out/boxed.onnx" --attack --original "$out/resnet20.safetensors" --key-file "$out/k.bin" --data "$data" \
    --student resnet8 --report "$out/report" --force ${SDBCTL_EVAL_ARGS:-}
