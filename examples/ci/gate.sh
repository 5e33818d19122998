#!/usr/bin/env sh
# Hold a box against gate.toml, or gate-quick.toml if SDBCTL_SUITE is quick, in any CI. Exit code 3 means that a gate is broken.
#
#   SDBCTL_KEY=... (the key file in base64, from a secret)   gate.sh BOX ORIGINAL DATA_SPEC REPORT_FOLDER
#
# BOX is what export --key-file made: keep it, like ORIGINAL, where nobody else reads. Of the key file nothing is written
# down: it reaches sdbctl through a pipe.
set -eu
here=$(dirname "$0")
suite=${SDBCTL_SUITE:-standard}
gate=$here/gate.toml
[ "$suite" = quick ] && gate=$here/gate-quick.toml
printf %s "$SDBCTL_KEY" | base64 -d | sdbctl eval "$1" --original "$2" --data "$3" --key-file - \
    --attack --suite "$suite" --gate "$gate" --report "$4" --force
