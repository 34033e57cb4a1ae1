"""The keeper: a small privileged process that lends out clocks and takes them back whatever happens."""
