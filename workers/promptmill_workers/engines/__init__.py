"""The engines' backends by name. A new one is a file here and a line in this table; the contract suite judges it."""

ENGINES = {
    "echo": "promptmill_workers.engines.echo:EchoBackend",
    "llamacpp": "promptmill_workers.engines.llama.backend:LlamaBackend",
    "mlx": "promptmill_workers.engines.mlx_lm.backend:MlxBackend",
}
