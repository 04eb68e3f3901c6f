"""A data set in memory with unequal numbers of pictures in the grades."""

from pathlib import Path

from ercn.data import Geometry, Manifest, Record

GRADES = [0] * 60 + [1] * 25 + [2] * 10 + [4] * 5  # no grade 3


def manifest():
    geometry = Geometry(64, 64, 0, 0, 64, 64)
    records = [Record(f"{i}", Path(), grade, f"{i}", "train", {}, geometry) for i, grade in enumerate(GRADES)]
    records += [Record("v", Path(), 3, "v", "val", {}, geometry)]  # other splits do not count
    names = ["no DR", "mild", "moderate", "severe", "proliferative"]
    return Manifest(Path(), "test", names, 64, "", (0.5,) * 3, (0.2,) * 3, records)
