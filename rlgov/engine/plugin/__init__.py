"""What runs inside vLLM's own processes; imports nothing but the standard library and vLLM itself."""
