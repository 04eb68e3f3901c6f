"""Metrics and localization of trained networks, and predictions of any pictures.

evaluating.py    ``evaluate``: which data and thresholds, the files that it writes
predicting.py    ``predict``: grades and maps of any pictures
infer.py         forward passes of both, over several views
collecting.py    one pass over a split: probabilities, map statistics, gallery
metrics.py       grading metrics and the patient bootstrap
calibration.py   temperature
localization.py  maps against lesion masks: AUPR, IoU, pointing game, healthy eyes
froc.py          FROC by lesion
filters.py       unlearned filters, the floor of the maps
unet.py          the U-Net of lesion masks, their ceiling
"""
