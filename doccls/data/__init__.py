"""The data pipeline, from a CSV and an image folder to batches: manifest, folds, scan, sampler, augmentation."""
