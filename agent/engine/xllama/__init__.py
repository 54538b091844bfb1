"""llama-server out of the xllamacpp wheel: `python -m agent.engine.xllama FLAGS`, for machines without a compiler."""
