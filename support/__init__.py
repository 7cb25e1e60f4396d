"""Helpers of the three files at the top: one job a file. A first reading can skip this folder."""
