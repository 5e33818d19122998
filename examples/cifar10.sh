#!/usr/bin/env bash
# Box two third-party CIFAR-10 checkpoints, export them, distil them with and without the key, and evaluate.
#
#   examples/cifar10.sh CHECKPOINT_FOLDER CIFAR10_FOLDER OUTPUT_FOLDER
#
# CHECKPOINT_FOLDER holds resnet20-12fca82f.th and resnet32-d509ac18.th (Idelbayev's CIFAR ResNets), CIFAR10_FOLDER
# the data set as Hugging Face parquet files. SDBCTL_EXAMPLE_ARGS may hold options for a smaller run, such as
# "--epochs 10 --owner-size 20000"; SDBCTL_EVAL_ARGS likewise, such as "--seeds 3 --tune 1".
set -euo pipefail
checkpoints=$1 data="parquet:$2" out=$3
mkdir -p "$out"
[ -e "$out/k.bin" ] || sdbctl keygen "$out/k.bin"
for name in resnet20-12fca82f resnet32-d509ac18; do
    box="$out/$name.boxed.safetensors"
    # shellcheck disable=SC2086
    [ -e "$box" ] || sdbctl box "$checkpoints/$name.th" --key-file "$out/k.bin" --data "$data" -o "$box" \
        --resume ${SDBCTL_EXAMPLE_ARGS:-}
    onnx="$out/$name.boxed.onnx"
    [ -e "$onnx" ] || sdbctl export "$box" -o "$onnx"
    [ -e "$out/$name.wrn16.safetensors" ] || sdbctl distill "$onnx" --student wrn16 --data "$data" \
        -o "$out/$name.wrn16.safetensors"
    [ -e "$out/$name.wrn16.keyed.safetensors" ] || sdbctl distill "$onnx" --student wrn16 --data "$data" \
        --key-file "$out/k.bin" -o "$out/$name.wrn16.keyed.safetensors"
    # shellcheck disable=SC2086
    sdbctl eval "$onnx" --attack --original "$checkpoints/$name.th" --key-file "$out/k.bin" --data "$data" \
        --student wrn-16-1 --reference "$out/$name.boxed.reference.safetensors" --report "$out/$name.report" --force \
        ${SDBCTL_EVAL_ARGS:-}
done
