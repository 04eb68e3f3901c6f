"""The table of the published data sets that ``ercn prepare`` reads.

A new data set is a file beside this one, with a function from the root folder to ``Published``, a row here, and its
name in ``ercn.config.Dataset``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from ercn.data.entries import Published
from ercn.data.sets import aptos, csv_list, davis, ddr, eyepacs, fgadr, idrid, messidor2, rldr


class Reader(NamedTuple):
    """labels: the values of ``PrepareConfig.label``, the default first. ``read`` takes the root and, where there are
    labels, one of them."""

    read: Callable[..., Published]
    labels: Iterable[str] = ()


READERS = {
    "eyepacs": Reader(eyepacs.read_eyepacs),
    "davis": Reader(davis.read_davis, davis.LABELS),
    "aptos": Reader(aptos.read_aptos),
    "messidor2": Reader(messidor2.read_messidor2, messidor2.LABELS),
    "idrid": Reader(idrid.read_idrid, idrid.LABELS),
    "idrid_segmentation": Reader(idrid.read_idrid_segmentation),
    "ddr": Reader(ddr.read_ddr),
    "ddr_segmentation": Reader(ddr.read_ddr_segmentation),
    "fgadr": Reader(fgadr.read_fgadr),
    "rldr": Reader(rldr.read_rldr, rldr.LABELS),
    "csv": Reader(csv_list.read_csv_list, csv_list.LABELS),
}
