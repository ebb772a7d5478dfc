#!/usr/bin/env bash
# Ask with a long and with a short prompt, and compare the two jobs row by row.
set -euo pipefail
cd "$(dirname "$0")"
promptmill run comments.jsonl --task long.task.yaml --model demo --name long
promptmill run comments.jsonl --task short.task.yaml --model demo --name short
promptmill compare long short -o comparison.html --force
promptmill show --flipped long short
