"""The transformer's mathematics, written once for any cut; knows nothing of torch.distributed or DeepSpeed."""
