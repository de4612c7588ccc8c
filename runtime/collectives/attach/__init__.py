"""How the wire is put under DDP and DeepSpeed."""
