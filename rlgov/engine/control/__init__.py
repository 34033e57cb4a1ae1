"""How others steer and read a serving stack: the local control API."""
