"""Trained classifiers outside the training program: exported, served and monitored."""
