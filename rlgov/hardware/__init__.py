"""GPUs: meters, clocks and events through the NVML bindings."""
