#!/usr/bin/env bash
# Start a worker and a server, ask them, end them. Redis must run at JOBS_REDIS_URL.
set -euo pipefail
cd "$(dirname "$0")"
port=${PORT:-8000}
trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT

promptmill db upgrade
promptmill worker --model demo &
promptmill api --port "$port" &
until curl -fs "http://127.0.0.1:$port/readyz" >/dev/null; do
    kill -0 %1 %2 # both must be alive
    sleep 0.2
done

OPENAI_BASE_URL="http://127.0.0.1:$port/v1" python ask.py
