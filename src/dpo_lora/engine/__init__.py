"""What makes training fast without changing it: pair packing, attention, LM head, reference cache,
micro-batches."""
