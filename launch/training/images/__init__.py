"""Images: where pictures with labels come from, and the batches that are made of them."""
