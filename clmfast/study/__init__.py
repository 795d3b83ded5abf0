"""Studies: many runs, over seeds and settings, read together as a table of claims and one page of pictures each.

base.py      what a study is
runs.py      trains what is missing, in processes of `clmfast.run`, and reads it
claims.py    effect, bootstrap interval, control, verdict
figures.py   what the pictures of several studies share
pages.py     the page and the tables that are written
revisit.py   what is measured afterwards, on checkpoints
emergence.py, early_stopping.py, ...         one file per study
"""
