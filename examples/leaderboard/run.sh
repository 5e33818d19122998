#!/usr/bin/env bash
# Every objective and serving-time wrapper on one checkpoint, evaluated alike: the table of examples/results.
#
#   examples/leaderboard/run.sh digits OUTPUT_FOLDER
#   examples/leaderboard/run.sh CHECKPOINT OUTPUT_FOLDER --data SPEC [any other option of sdbctl sweep]
#
# SDBCTL_ROWS="--objective conceal --confidence class --confidence rough --confidence exact --wrapper quantised-confidence"
# compares other rows: protection against confidence quality.
#
# With `digits`, the teacher is trained first, of 16x16 pixels: of 8x8 a key can be found. Every finished box, report and
# student is kept in OUTPUT_FOLDER, so the same command goes on where it stopped. The table is OUTPUT_FOLDER/sweep.md, its
# numbers sweep.json.
set -euo pipefail
checkpoint=$1 out=$2
shift 2
mkdir -p "$out"
[ -e "$out/k.bin" ] || sdbctl keygen "$out/k.bin"
if [ "$checkpoint" = digits ]; then
    small=(--data digits --transfer-size 128 --test-size 500)
    checkpoint="$out/teacher.safetensors"
    [ -e "$checkpoint" ] || sdbctl train --arch cnn "${small[@]}" --image-size 16 --epochs 40 --batch-size 64 -o "$checkpoint"
    set -- "${small[@]}" --epochs 100 --batch-size 64 --student cnn-tiny --student-epochs 120 --student-batch-size 32 \
        --tune 3 --seeds 8 "$@"
fi
usual="--objective guard --objective conceal --objective sdb --objective sdb:paper --objective sdb:release --objective nasty --objective cmim
    --objective ast --wrapper top1 --wrapper class-constant --wrapper uniform-nontarget --wrapper quantised-confidence
    --wrapper rounded --wrapper reverse-sigmoid --wrapper misdirection"
# shellcheck disable=SC2086
sdbctl sweep "$checkpoint" --key-file "$out/k.bin" --report "$out" ${SDBCTL_ROWS:-$usual} "$@"
