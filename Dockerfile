# One image for migrations, workers and the API. The defaults build the CPU image; for CUDA see docker-compose.yml.
ARG BUILD_IMAGE=debian:12-slim
ARG RUN_IMAGE=debian:12-slim

FROM ${BUILD_IMAGE} AS build
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
       build-essential python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir uv
# The image's user cannot keep bytecode itself.
ENV UV_PROJECT_ENVIRONMENT=/opt/promptmill UV_PYTHON_DOWNLOADS=never UV_LINK_MODE=copy UV_COMPILE_BYTECODE=1
WORKDIR /src
# The extra nvidia is a few Python files: they read the memory of GPUs where a driver is, and do nothing elsewhere.
# The slow part, compiling llama.cpp, depends on these two files alone.
ARG CMAKE_ARGS="-DGGML_NATIVE=OFF"
COPY pyproject.toml uv.lock ./
RUN --mount=type=cache,target=/root/.cache/uv \
    CMAKE_ARGS="${CMAKE_ARGS}" /opt/uv/bin/uv sync --frozen --no-dev --extra api --extra nvidia --no-install-project
COPY . .
RUN --mount=type=cache,target=/root/.cache/uv \
    /opt/uv/bin/uv sync --frozen --no-dev --extra api --extra nvidia --no-editable

FROM ${RUN_IMAGE}
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 promptmill \
    && install -d -o promptmill -g promptmill /home/promptmill/files /models
COPY --from=build /opt/promptmill /opt/promptmill
# Outside any checkout: its folders must not be importable.
WORKDIR /home/promptmill
USER promptmill
ENV PATH=/opt/promptmill/bin:$PATH PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
ENTRYPOINT ["promptmill"]
CMD ["--help"]
