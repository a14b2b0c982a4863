"""The transformer's mathematics, written once for all layouts. Uses neither torch.distributed nor DeepSpeed."""
