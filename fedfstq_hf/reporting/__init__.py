"""What a run leaves for its reader: figures to a target, plots, a report; all made from `metrics.jsonl` alone."""
