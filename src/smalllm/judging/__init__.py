"""Judging models and runs: stories, copies, grades, pairs, and whether a difference is luck."""
