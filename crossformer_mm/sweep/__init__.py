"""Evaluation of one checkpoint at several group sizes and intervals: settings, costs, report."""
