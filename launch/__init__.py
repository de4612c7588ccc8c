"""The roof: the distributed trainer and the command line."""
