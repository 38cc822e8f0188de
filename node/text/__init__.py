"""From prompts to text with a transformers model: commands and the HTTP API share it. Knows nothing of swarms."""
