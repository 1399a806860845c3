"""What ``inspect(model, batches)`` measures and tells: one file for each question that a diagnosis answers."""
