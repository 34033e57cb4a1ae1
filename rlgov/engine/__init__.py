"""A running vLLM: its process, the plugin inside it, the gateway before it, and what is read from it."""
