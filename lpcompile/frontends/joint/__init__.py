"""Joint: forward and backward as one graph, under torch.compile."""
