"""The HTTP API that OpenAI's clients speak: requests, a queue, one model, and events."""
