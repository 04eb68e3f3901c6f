"""Pictures: published data sets (``sets``), synthetic eyes (``phantom``), crops, splits by patient, and tensors."""

from ercn.data.dataset import PictureDataset, collate
from ercn.data.geometry import Geometry, locate_disc
from ercn.data.images import DataError, read_picture
from ercn.data.manifest import Manifest, Record
from ercn.data.phantom import render_phantom
from ercn.data.preparation import prepare

__all__ = [
    "DataError",
    "Geometry",
    "Manifest",
    "PictureDataset",
    "Record",
    "collate",
    "locate_disc",
    "prepare",
    "read_picture",
    "render_phantom",
]
