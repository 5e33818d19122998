#!/usr/bin/env bash
# A hundred classes at 32x32, where distillation has more to give: train, box, export, distil and evaluate a WRN-16-2.
#
#   examples/tinyimagenet.sh DATA_FOLDER OUTPUT_FOLDER
#
# DATA_FOLDER holds Hugging Face parquet files. What is there is not made again, and what was interrupted goes on.
# SDBCTL_BOX_ARGS="--objective conceal" boxes as the reports of examples/results were made. That needs a network like this
# one, of 128 features: with fewer than 99 a linear layer cannot make the outputs of a hundred classes flat, and
# SDBCTL_ARCH=resnet20 (64 features) shows what that costs.
set -euo pipefail
data="parquet:$1" out=$2 arch=${SDBCTL_ARCH:-wrn-16-2}
mkdir -p "$out"
[ -e "$out/k.bin" ] || sdbctl keygen "$out/k.bin"
[ -e "$out/$arch.safetensors" ] || sdbctl train --arch "$arch" --data "$data" --epochs 10 --resume \
    -o "$out/$arch.safetensors"
# shellcheck disable=SC2086
[ -e "$out/boxed.safetensors" ] || sdbctl box "$out/$arch.safetensors" --key-file "$out/k.bin" --data "$data" --resume \
    -o "$out/boxed.safetensors" --epochs 16 ${SDBCTL_BOX_ARGS:-}
[ -e "$out/boxed.onnx" ] || sdbctl export "$out/boxed.safetensors" --key-file "$out/k.bin"
for key in "" "--key-file $out/k.bin"; do
    student="$out/wrn16${key:+.keyed}.safetensors"
    # shellcheck disable=SC2086
    [ -e "$student" ] || sdbctl distill "$out/boxed.onnx" --student wrn16 --data "$data" --epochs 6 $key -o "$student"
done
# shellcheck disable=SC2086
sdbctl eval "$out/boxed.onnx" --attack --original "$out/$arch.safetensors" --key-file "$out/k.bin" --data "$data" \
    --student resnet8 --report "$out/report" --force ${SDBCTL_EVAL_ARGS:-}
