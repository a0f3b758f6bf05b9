"""Restore an image from a measurement: samples, mean, intervals, a figure and a run folder."""
