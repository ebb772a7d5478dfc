#!/usr/bin/env bash
# Builds and measures everything of the GPU figures on a bare machine without network.
#
#   tests/benchmarks/gpu.sh FOLDER [SLOTS...]        e.g. tests/benchmarks/gpu.sh /media/wheels 64 128
#
# FOLDER holds wheels of all dependencies for this Python and platform, the source distribution of llama-cpp-python, and
# those of its build tools (scikit-build-core, cmake, ninja). On a machine with a network it is filled by
#   pip download --dest FOLDER --only-binary :all: numpy gguf aiohttp hatchling scikit-build-core cmake ninja \
#       $(uv export --no-dev --no-hashes --no-emit-project | grep -v llama-cpp-python)
#   pip download --dest FOLDER --no-deps --no-binary :all: llama-cpp-python==0.3.36
# SHARED (default: ../shared beside the repository) holds `peers`. Needs nvcc, a C++ compiler and Python 3.11 or newer.
# Figures go to standard output; put them with this command and the date into tests/benchmarks/RESULTS.md.
set -euo pipefail

wheels=$(realpath "${1:?a folder of wheels and sources}"); shift
slots=("$@"); [ $# -gt 0 ] || slots=(64 128)
root=$(realpath "$(dirname "$0")/../..")
shared=${SHARED:-$root/../shared}
work=${WORK:-$(mktemp -d -t promptmill-gpu-XXXXXX)}
export PROMPTMILL_PEERS=$work/peers PIP_NO_INDEX=1 PIP_FIND_LINKS=$wheels PYTHONSAFEPATH=1 PROMPTMILL_SHARED=$shared
mkdir -p "$PROMPTMILL_PEERS"

command -v nvcc >/dev/null || { echo "nvcc is not on PATH: nothing can be built for the GPU" >&2; exit 2; }
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader

echo "== environment"
python3 -m venv "$work/venv"
python=$work/venv/bin/python
"$python" -m pip install --quiet scikit-build-core cmake ninja hatchling
export PATH=$work/venv/bin:$PATH
CMAKE_ARGS="-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=native" CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) \
    "$python" -m pip install --quiet --no-build-isolation "$wheels"/llama_cpp_python-*.tar.gz
"$python" -m pip install --quiet --no-build-isolation "$root" gguf aiohttp

echo "== peers, from the same sources"
tar xzf "$wheels"/llama_cpp_python-*.tar.gz -C "$PROMPTMILL_PEERS"
src=$(echo "$PROMPTMILL_PEERS"/llama_cpp_python-*/vendor/llama.cpp)
cmake -S "$src" -B "$PROMPTMILL_PEERS/build" -DCMAKE_BUILD_TYPE=Release -DGGML_CUDA=ON \
    -DCMAKE_CUDA_ARCHITECTURES=native -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_UI=OFF >/dev/null
cmake --build "$PROMPTMILL_PEERS/build" -j"$(nproc)" --target llama-server llama-batched-bench >/dev/null
"$python" "$shared/peers/bench_model.py"
"$python" "$shared/peers/workloads.py"

for n in "${slots[@]}"; do
    echo "== $n slots"
    PYTHONPATH=$root/tests/benchmarks "$python" "$root/tests/benchmarks/peers.py" --repeat 3 --device cuda:0 \
        --cases "short-$n" "shared-$n"
done
"$work/venv/bin/promptmill" bench --model "$PROMPTMILL_PEERS/qwen3-0.6b-q4_k_m.gguf" --device cuda:0 \
    --slots "${slots[0]}" --requests 512
echo "done; everything lies in $work"
