"""An OpenAI-compatible streaming reverse proxy that stamps every request."""
