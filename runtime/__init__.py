"""The ground floor: numbers, ops, kernels, collectives, optimizers. Knows no graph and no policy."""
