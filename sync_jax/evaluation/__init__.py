"""Predictions, the evaluation record, reports, comparisons and ensembles."""
