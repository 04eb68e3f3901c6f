"""Triton kernels, their launchers and tile configs. Nothing in this package registers an operator."""
