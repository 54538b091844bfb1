"""What the engine decides by a model's architecture and no file says, read from its source (src/models)."""

# Period of the sliding layers where the file does not say: all but the last of each period slide.
SLIDING_PERIODS = {
    "afmoe": 4,
    "cohere2": 4,
    "exaone-moe": 4,
    "gemma-embedding": 6,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "llama4": 4,
    "mellum": 4,
    "olmo2": 4,
    "plamo3": 8,
}
# All but the first of each period slide.
SLIDING_PERIODS_DENSE_FIRST = {"cohere2moe": 4, "laguna": 4, "modern-bert": 3, "smallthinker": 4}
DEFAULT_WINDOWS = {"gemma2": 4096, "llama4": 8192}
IGNORED_WINDOWS = frozenset({"phi3"})  # the engine keeps everything
RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
BOTH_IN_EVERY_LAYER = frozenset({"falcon-h1"})
FULL_ATTENTION_INTERVALS = {"qwen3next": 4, "qwen35": 4, "qwen35moe": 4, "minimax-01": 8}
LIGHTNING_ATTENTION = frozenset({"minimax-01"})  # a state of key length squared for every head
KV_LAYERS_FROM_START = {"gemma3n": 20}  # the later ones use the caches of earlier ones
# On x86 weights of these types are copied into another order, even if they are the embeddings; on ARM of some more.
REPACKED = frozenset({"Q2_K", "Q4_0", "Q4_K", "IQ4_NL", "MXFP4"})
# Queries, keys and values are one tensor here, and so are the two halves of the feed-forward.
FUSED = frozenset({"phi3"})
# These compute the last layer for every token; others drop all tokens but those that are answered before its
# feed-forward (`embeddings_nextn_masked` in the engine).
ALL_TOKENS_TO_THE_END = frozenset(
    {"bailingmoe3", "cohere2moe", "deepseek2", "deepseek32", "deepseek4", "gemma4", "glm-dsa", "glm4moe", "glm5-next"}
    | {"gpt-oss", "hy-v3", "lfm2", "lfm2moe", "mimo2", "nemotron_h", "nemotron_h_moe", "qwen35", "qwen35moe"}
    | {"qwen3next", "step35"}
)
