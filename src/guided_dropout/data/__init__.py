"""Labelled data: files, GLUE and hub data sets, as examples, tasks, splits and tokens."""
