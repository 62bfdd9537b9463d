"""From a CSV and a folder of images to batches: manifest, folds, order, pages, augmentation."""
