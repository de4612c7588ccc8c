"""The middle floor: graph in, graph out."""
