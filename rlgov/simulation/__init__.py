"""A discrete-event simulation of vLLM serving: physics, profiles, and the compiled simulator."""
