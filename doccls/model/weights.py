"""The exceptions that reading a damaged or foreign tensor file can raise."""

import pickle
import struct
import zipfile

from safetensors import SafetensorError

# torch.load(weights_only=True) and safetensors check little before they index, slice and unpack.
UNREADABLE = (
    OSError, RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError, EOFError, struct.error,
    zipfile.BadZipFile, pickle.UnpicklingError, SafetensorError,
)  # fmt: skip
