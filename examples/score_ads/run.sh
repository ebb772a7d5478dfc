#!/usr/bin/env bash
# Ask the model about each comment, score the answers, judge the gates (exit code 3 when one fails).
set -euo pipefail
cd "$(dirname "$0")"
promptmill run comments.jsonl --task ads.task.yaml --model demo -o results.jsonl --force
promptmill report @last -o report.html --force
promptmill show @last --wrong
