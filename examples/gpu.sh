#!/usr/bin/env bash
# What is to be measured on a GPU: steps beside their floors, boxing a ResNet-18 on CIFAR-10, the standard suite.
#
#   examples/gpu.sh CIFAR10_FOLDER OUTPUT_FOLDER
#
# CIFAR10_FOLDER holds the data set as Hugging Face parquet files. Every step is skipped if its output is there, an
# interrupted one goes on. The JSON files in OUTPUT_FOLDER name the hardware; copy them to examples/results. On a
# machine without a GPU it computes the same, slowly: SDBCTL_ARCH=resnet8 SDBCTL_EXAMPLE_ARGS="--epochs 1 --owner-size
# 1000" SDBCTL_EVAL_ARGS="--suite quick --epochs 1 --transfer-size 500" tries it out. The measurements of examples/results
# are of SDBCTL_BOX_ARGS="--objective conceal".
set -euo pipefail
here=$(dirname "$0") data="parquet:$1" out=$2 arch=${SDBCTL_ARCH:-resnet18_cifar}
mkdir -p "$out"

# once NAME COMMAND…: the command's standard output becomes NAME, and is there only if the command succeeded; how long
# each took, beginning and ending included, is in seconds.txt
once() {
    [ -e "$out/$1" ] && return
    local begin=$SECONDS
    "${@:2}" > "$out/$1.part"
    mv "$out/$1.part" "$out/$1"
    echo "$1 $((SECONDS - begin))" >> "$out/seconds.txt"
}

once bench-steps.json sdbctl bench --arch "$arch" --student resnet20 --json
once bench-loop.json python "$here/bench/loop.py"
once bench-together.json python "$here/bench/together.py"
once bench-means.json python "$here/bench/means.py" --arch "$arch"
once bench-published.json python "$here/bench/published_recipe.py" --arch "$arch"
[ -e "$out/k.bin" ] || sdbctl keygen "$out/k.bin"
# shellcheck disable=SC2086
once train.json sdbctl train --arch "$arch" --data "$data" --resume --json -o "$out/original.safetensors" \
    ${SDBCTL_EXAMPLE_ARGS:-}
# shellcheck disable=SC2086
once box.json sdbctl box "$out/original.safetensors" --key-file "$out/k.bin" --data "$data" --resume --json \
    -o "$out/boxed.safetensors" ${SDBCTL_EXAMPLE_ARGS:-} ${SDBCTL_BOX_ARGS:-}
once export.json sdbctl export "$out/boxed.safetensors" --key-file "$out/k.bin" --json
# shellcheck disable=SC2086
once eval.json sdbctl eval "$out/boxed.onnx" --attack --original "$out/original.safetensors" --key-file "$out/k.bin" \
    --data "$data" --report "$out/report" --force --json ${SDBCTL_EVAL_ARGS:-}
