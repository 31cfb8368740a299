"""Runs side by side: read, merged by workload, reduced to figures, put into tables and notes."""
