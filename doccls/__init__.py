"""doccls: K-fold training of image classifiers, from a CSV and a folder of images to merged out-of-fold predictions."""

__version__ = "0.1.0"
