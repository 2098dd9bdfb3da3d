"""arctic_like: post-train language models from one YAML recipe under DeepSpeed ZeRO."""
