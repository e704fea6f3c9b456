"""Scanner files to batches: readers, checks, partitions, preprocessing, augmentation, simulated hospitals."""
