"""The engines by name. A new one is a file here and a line in this table; it must pass the contract suite."""

ENGINES = {
    "echo": "promptmill_workers.engines.echo:EchoEngine",
    "llamacpp": "promptmill_workers.engines.llama.engine:LlamaCppEngine",
    "mlx": "promptmill_workers.engines.mlx_lm.engine:MlxEngine",
}
